"""Datasets of clips and the LightningDataModule that serves them."""
