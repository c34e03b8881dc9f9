"""Stand-in."""
from pydantic import BaseModel
from m2mkd_ray.data.logits import LogitsKind as LogitsKind
class LogitsConfig(BaseModel):
    index: int
def run(): ...
def together(): ...
