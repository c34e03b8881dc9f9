"""m2mKD on Ray: module-to-module knowledge distillation of modular transformers.

A pretrained ViT (the teacher), a shallow meta model and a modular student are cut
into the same number of modules; each student module is distilled from its teacher
module inside the frozen meta model, all of them at the same time, and the student
that is assembled from them is fine-tuned (arXiv 2402.16918).

`pipeline.py` is the whole flow; `docs/design.md` says what is where, and why.
Importing the package imports neither torch nor Ray.
"""

__version__ = "0.1.0"
