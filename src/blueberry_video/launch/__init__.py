"""Before a run: the dry run, the doctor, one or several processes."""
