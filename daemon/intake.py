"""The intake: from a request, a declared model or a new file in a watched folder to a job of the queue."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from daemon.errors import OrderRefused
from daemon.settings import ModelEntry, Settings, config_dir
from daemon.sources import check_folder
from loops.engine.ladders import expand
from loops.finetune.model_folder import CONFIG
from loops.fingerprint import fingerprint
from loops.pass1.criteria import parse_gates
from loops.pass1.plan import PressPlan, parse_size
from state.faults import NightpressError
from state.manifest import check_name, slug
from state.records import JobSpec

#: shards but the first, steps of a training, and what other programs are still writing
_NOT_WHOLE = re.compile(r"-(?!00001)[0-9]{5}-of-[0-9]{5}\.gguf$|^\.|\.(part|tmp|download)\b|^checkpoint-[0-9]+$",
                        re.IGNORECASE)


def name_of(model: Path) -> str:
    """Return the name a model goes by: its folder's, or its file's without type and shard number."""
    if model.is_dir():
        return slug(model.name)
    stem = re.sub(r"-[0-9]{5}-of-[0-9]{5}$", "", model.stem)
    return slug(re.sub(r"[._-](f16|bf16|f32|fp16|fp32)$", "", stem, flags=re.IGNORECASE))


@dataclass(frozen=True)
class Order:
    """What a job is to do.

    Attributes:
        plan: to press; None only for a check of a deployed model whose original is not known.
        promoting: release the chosen level.
        fresh: measure again what was measured before.
        deployed: name of a deployed model to verify first.
        finetune: what a whole fine-tuning is told, instead of a plan; see `daemon.finetune_config`.
    """

    plan: PressPlan | None
    promoting: bool = True
    fresh: bool = False
    deployed: str | None = None
    finetune: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """Of the model."""
        return str((self.finetune or {}).get("name") or (self.plan.name if self.plan else self.deployed) or "")

    def as_json(self) -> dict[str, Any]:
        """Return what `of` reads."""
        return {"plan": self.plan.as_json() if self.plan else None, "promoting": self.promoting, "fresh": self.fresh,
                "deployed": self.deployed, "finetune": self.finetune}

    @classmethod
    def of(cls, spec: Mapping[str, Any], settings: Settings) -> Order:
        """Return the order that a job's row holds, with these settings' folders, and their deadline if it has none.

        Raises:
            OrderRefused: it is none.
        """
        plan = None
        if spec.get("finetune") is not None:
            from daemon.finetune_config import FinetuneSpec

            return cls(None, finetune=FinetuneSpec.of(spec["finetune"]).as_json())
        if spec.get("plan") is not None:
            plan = _plan(spec["plan"])
            plan = replace(plan, blobs=str(settings.blobs), scratch=str(settings.scratch), name=check_name(plan.name),
                           timeout_s=plan.timeout_s or settings.level_timeout_s)
            parse_gates(plan.gates, plan.max_degradation)
        return cls(plan, bool(spec.get("promoting", True)), bool(spec.get("fresh", False)), spec.get("deployed"))


@functools.cache
def _plans() -> TypeAdapter[PressPlan]:
    return TypeAdapter(PressPlan)


def _plan(fields: Any) -> PressPlan:
    """Return the plan that fields of JSON hold, every one of them known and of its type.

    Raises:
        OrderRefused: naming the first that is not.
    """
    try:
        _plans().validate_python(fields)
        return PressPlan.from_json(fields)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"])) or "plan"
        raise OrderRefused(f"The plan cannot be carried out: {where}: {first['msg']}.") from problem
    except (TypeError, ValueError, AttributeError) as problem:
        raise OrderRefused(f"The plan cannot be carried out: {problem}.") from problem


def plan_for(settings: Settings, entry: ModelEntry) -> PressPlan:
    """Return the plan of a declared model.

    Raises:
        NightpressError: a size, gate or name is wrong, in a sentence.
    """
    path = entry.path.expanduser().absolute()
    parse_gates(entry.gates, entry.max_degradation)
    return PressPlan(
        model=str(path), name=check_name(entry.name) if entry.name else name_of(path), levels=entry.levels,
        blobs=str(settings.blobs), scratch=str(settings.scratch), target_bytes=parse_size(entry.target_size),
        max_degradation=entry.max_degradation, gates=entry.gates, domains=entry.domains, strategy=entry.strategy,
        max_iterations=max(10, len(expand(entry.levels))),
        user_domains=str(config_dir() / "calibration"), timeout_s=settings.level_timeout_s)


def _real(path: Path) -> Path:
    """Return a path without links; one that goes round in circles stays as it is."""
    return Path(os.path.realpath(path))


Facts = tuple[tuple[int, int], ...]  #: size and time of each file of a model


def _facts(path: Path) -> Facts | None:
    """Return size and time of a model's file, of all its shards or its folder that are there; None for no model."""
    if path.is_dir():
        with contextlib.suppress(OSError):
            files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
            found = [file.stat() for file in files]
            if (path / CONFIG).is_file() and any(file.suffix == ".safetensors" for file in files):
                return tuple((one.st_size, one.st_mtime_ns) for one in found)
        return None
    shards = re.fullmatch(r"(.+-)00001(-of-[0-9]{5}\.gguf)", path.name, re.IGNORECASE | re.DOTALL)
    files = [path]
    if shards is not None:
        form = re.compile(re.escape(shards[1]) + "[0-9]{5}" + re.escape(shards[2]))
        files = sorted(other for other in path.parent.iterdir() if form.fullmatch(other.name)) if path.is_file() else []
    try:
        found = [file.stat() for file in files]
    except OSError:
        return None
    return tuple((one.st_size, one.st_mtime_ns) for one in found) if found and path.is_file() else None


def declared(settings: Settings) -> Iterator[JobSpec]:
    """Yield a job for every declared model whose file is there; changed, it is another job.

    Raises:
        NightpressError: an entry is wrong.
    """
    for entry in settings.models:
        plan = plan_for(settings, entry)
        facts = _facts(plan.model_path)
        if facts is not None:
            key = fingerprint("declared", entry=entry.model_dump(mode="json", exclude={"priority"}), facts=list(facts))
            yield JobSpec(plan.name, "settings", Order(plan).as_json(), key, entry.priority)


def reevaluations(deployed: Mapping[str, Mapping[str, Any] | None]) -> Iterator[JobSpec]:
    """Yield a job of the lowest priority for every deployed model: verify it, and measure it again if need be.

    Args:
        deployed: names of deployed models, each with the plan it was pressed by, if the ledger knows it.
    """
    for name, spec in deployed.items():
        plan = None
        if spec is not None:
            with contextlib.suppress(OrderRefused):  # of a version that knew other parts of a plan
                plan = _plan({key: value for key, value in spec.items() if key != "facts"})
            if plan is not None and plan.source:  # the folder stayed, and what was converted of it need not have
                plan = replace(plan, model=str(plan.source.get("folder", plan.model)), source={})
            plan = plan if plan is not None and plan.model_path.exists() and not plan.judge else None
        yield JobSpec(name, "reevaluation", Order(plan, promoting=False, deployed=name).as_json(), priority=-100)


@dataclass
class Folders:
    """Watched folders: what is new in them, once it has stopped changing.

    Attributes:
        seen: size and time of each file, and since when by the monotonic clock they are so.
        judged: files that were looked into, with what they were then.
    """

    seen: dict[Path, tuple[Facts, float]] = field(default_factory=dict)
    judged: dict[Path, Facts] = field(default_factory=dict)

    def scan(self, settings: Settings, now_s: float) -> Iterator[JobSpec]:
        """Yield a job for every unquantized GGUF, and every Hugging Face folder, that settled since the last scan.

        Quantized files, broken ones and later shards are passed over: a folder of models is full of them. A
        file counts as looked into once whoever takes the job asks for the next.
        """
        ours = {_real(folder) for folder in (settings.deploy, settings.blobs, settings.scratch, settings.state_dir)}
        there: set[Path] = set()
        for folder in settings.watch:
            models = [file.parent for file in folder.rglob(CONFIG)]
            for path in sorted([*folder.rglob("*.[gG][gG][uU][fF]"), *models]):
                hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
                if hidden or _NOT_WHOLE.search(path.name) or ours & {_real(path), *_real(path).parents}:
                    continue
                there.add(path)
                facts = _facts(path)
                if facts is None or self.judged.get(path) == facts:
                    continue
                known = self.seen.get(path)
                if known is None or known[0] != facts:
                    self.seen[path] = (facts, now_s)
                elif now_s - known[1] >= settings.watch_settle_s:
                    if _is_original(path):
                        key = fingerprint("file", path=str(path.absolute()), facts=list(facts))
                        plan = plan_for(settings, ModelEntry(path=path))
                        yield JobSpec(plan.name, "folder", Order(plan).as_json(), key)
                    self.judged[path] = facts
        self.seen = {path: found for path, found in self.seen.items() if path in there}
        self.judged = {path: found for path, found in self.judged.items() if path in there}


def _is_original(path: Path) -> bool:
    from loops.engine.gguf_check import check_model
    from loops.engine.gguf_header import any_quantized

    try:
        if path.is_dir():
            check_folder(path)
            return True
        return not any_quantized(check_model(path).tensors)
    except (NightpressError, OSError):
        return False
