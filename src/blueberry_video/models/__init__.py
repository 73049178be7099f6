"""One file per architecture: a pure ``nn.Module`` and the conversion of its published checkpoints."""
