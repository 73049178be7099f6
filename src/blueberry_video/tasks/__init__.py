"""One file per training objective: a thin LightningModule that holds loss, metrics and optimiser, and no layer."""
