"""The demo's claim, over pretraining seeds: minutes long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from miram import demo
from miram.data.phantom import PhantomSettings
from miram.data.sources.phantom import make_phantoms
from miram.finetune.probe import probe
from miram.pretrain.stage import pretrain


@pytest.fixture(scope="module")
def other_phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patients on whom nothing of the demo was ever tried."""
    out = tmp_path_factory.mktemp("demo") / "shards"
    make_phantoms(out, demo.PATIENTS, PhantomSettings(size=demo.SIZE, seed=1000))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pretraining_beats_random_weights_on_patients_never_seen(
    seed: int, other_phantoms: Path, tmp_path: Path
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    same = [f"--data.shards={other_phantoms}", f"--seed={seed}"]
    pretrain("pretrain/demo", [*same, f"--out={tmp_path / 'p'}"])
    run = probe("probe/demo", [*same, f"--probe.encoder={tmp_path / 'p'}", f"--out={tmp_path / 'q'}"])
    result = json.loads((run.folder / "result.json").read_text())
    print(json.dumps(result["rows"]), json.dumps(result["differences"]))
    assert result["differences"][0]["interval"][0] > 0
    assert 0.35 < result["rows"][-2]["value"] < result["value"] < 0.95
