"""First line of every notebook, `import start`: finds picotron_lab from this folder, and shows
figures in the page. One thread per rank is enough for matrices this small."""

import sys
from pathlib import Path

import torch
from IPython import get_ipython

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
get_ipython().run_line_magic("matplotlib", "inline")
torch.set_num_threads(1)
