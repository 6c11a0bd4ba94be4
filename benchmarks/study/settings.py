"""Every number of the study, fixed before the first reported seed ran."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from tikmix_fast.demo.gpt import GPTSettings
from tikmix_fast.demo.settings import DemoSettings

__all__ = ["SETTINGS", "StudySettings"]


@dataclass(frozen=True)
class StudySettings:
    """Settings of one study, all arms and all seeds.

    Attributes
    ----------
    main : DemoSettings
        The model, its training, and the size of TiKMiX's measurements; an arm sets the seed.
    proxy : DemoSettings
        The same for one proxy run of RegMix and DoGE.
    device : "cpu" or "cuda"
    short_bytes : int
        Size of the scarce domain.
    proxies : tuple of int
        Numbers of proxy runs of the RegMix arms; a smaller arm uses the first runs of the largest.
    update_every : int
        Steps between changes of the mixture of the online baselines (ODM, ADO, DGA).
    ado_start : int
        Step of ADO's first fit; its fits leave out as many steps.
    ado_refit : int
        Steps between ADO's fits.
    dga_rate, dga_rows, dga_smoothing : float, int, float
        Step size of DGA, sequences of each domain and task per update, and share of the old mixture in the new one.
    doge_rate, doge_rows : float, int
        Step size of DoGE (eta / mu there) and sequences of each domain and task per step of its proxy run.
    in_run_every, in_run_rows : int
        Steps between two measured training steps of TiKMiX-D in-run, and sequences of each task in one.
    in_run_time : float
        Time constant of the average over measured steps, in steps.
    in_run_change : int
        Steps between TiKMiX-D in-run's changes of the mixture.
    candidates : int
        Mixtures that TiKMiX-M labels at a stage boundary with linear labels.
    probe_candidates, probe_steps : int
        The same with probe labels, and optimizer steps on each.
    """

    main: DemoSettings
    proxy: DemoSettings
    device: Literal["cpu", "cuda"] = "cpu"
    short_bytes: int = 100_000
    proxies: tuple[int, ...] = (16, 64, 256)
    update_every: int = 20
    ado_start: int = 80
    ado_refit: int = 40
    dga_rate: float = 1.0
    dga_rows: int = 2
    dga_smoothing: float = 0.1
    doge_rate: float = 1.0
    doge_rows: int = 2
    in_run_every: int = 10
    in_run_rows: int = 4
    in_run_time: float = 100.0
    in_run_change: int = 40
    candidates: int = 256
    probe_candidates: int = 32
    probe_steps: int = 5
    seeds: tuple[int, ...] = field(default=(0, 1, 2, 3, 4))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**dataclasses.asdict(self), "proxies": list(self.proxies), "seeds": list(self.seeds)}

    @property
    def tokens(self) -> int:
        """Training tokens of every arm."""
        return self.main.steps * self.main.batch * self.main.model.length


_SMALL = StudySettings(
    main=DemoSettings(steps=800, stages=5, warm_up=40, domain_batches=10, evaluate_every=160),
    proxy=DemoSettings(
        steps=150, batch=8, model=GPTSettings(layers=1, width=48), learning_rate=5e-3, warm_up=15, evaluate_every=150
    ),
)

SETTINGS = {
    # For tests: everything happens, nothing is learnt.
    "tiny": StudySettings(
        main=DemoSettings(
            steps=24, stages=3, batch=4, model=GPTSettings(layers=1, heads=2, width=16, length=32), learning_rate=1e-2,
            warm_up=4, task_batches=2, task_rows=2, task_splits=2, domain_batches=2, domain_rows=1, evaluate_every=8,
            curve_rows=4, domain_bytes=40_000, task_bytes=20_000,
        ),
        proxy=DemoSettings(
            steps=4, stages=2, batch=2, model=GPTSettings(layers=1, heads=1, width=8, length=32), warm_up=1,
            evaluate_every=4, curve_rows=2,
        ),
        short_bytes=4_000, proxies=(4, 8), update_every=4, ado_start=8, ado_refit=8, in_run_every=2, in_run_time=8.0,
        in_run_change=8, candidates=16, probe_candidates=10, probe_steps=2,
    ),
    "small": _SMALL,
    # Not run yet, for lack of a machine with a GPU.
    "gpu": dataclasses.replace(
        _SMALL,
        main=DemoSettings(
            steps=4_000, stages=5, batch=64, model=GPTSettings(layers=8, heads=8, width=512, length=256),
            learning_rate=1e-3, warm_up=200, evaluate_every=400, domain_bytes=16_000_000,
        ),
        proxy=DemoSettings(
            steps=1_000, batch=32, model=GPTSettings(layers=2, heads=4, width=64, length=256), learning_rate=3e-3,
            warm_up=100, evaluate_every=1_000,
        ),
        device="cuda", short_bytes=1_600_000, update_every=50, ado_start=400, ado_refit=200,
    ),
}  # fmt: skip
