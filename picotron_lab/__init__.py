"""picotron_lab: how large language models are trained on many GPUs, one technique per file."""
