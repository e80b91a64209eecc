"""What torch says when torchao is imported is about torchao's code, and stays off the user's screen."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

CODE = """
import logging
{first}
import torchao.quantization, transformers.quantizers, peft
logging.getLogger("torch.utils._pytree").warning("another warning")
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchao") is None, reason="needs miram[compress]")
@pytest.mark.parametrize(("first", "said"), [("import miram.finetune.peft", False), ("", True)])
def test_only_the_warning_of_torchao_s_enums_is_silenced(first: str, said: bool) -> None:
    done = subprocess.run([sys.executable, "-c", CODE.format(first=first)], capture_output=True, text=True, check=True)
    assert "another warning" in done.stderr
    assert ("register_constant() on Enum" in done.stderr) is said
