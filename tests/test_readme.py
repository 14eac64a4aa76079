"""The README's code for the operators runs as it stands; test_model_hf.py compiles models as its other code does."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_operators_called_directly():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "from dsv4_fusion import ops" in block]
    torch.manual_seed(0)
    values: dict = {}
    exec(code, values)
    assert values["q_fp8"].shape == (5, 64, 128) and values["q_fp8"].dtype == torch.float8_e4m3fn
    keys, k = values["keys"][0], values["k"]
    assert keys[:4].isfinite().all() and not keys[4:].any()  # four stored, the skipped one not
    lengths = keys[:4].float().norm(dim=-1)  # normalised, turned and transformed: the length is sqrt(d)
    torch.testing.assert_close(lengths, torch.full((4,), k.shape[1] ** 0.5), rtol=0.02, atol=0)
