"""What a fine-tuning is told: one TOML file, one table per stage, unknown keys refused with the nearest name."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from loops.starter import STARTER
from state.faults import NightpressError
from state.manifest import check_name, slug

#: fields of TrainSpec and MergeSpec that the pipeline fills in itself
_FILLED = {"train": {"model", "dataset", "output"}, "merge": {"base", "adapters", "output"}}


class FinetuneRefused(NightpressError):
    """This fine-tuning cannot be done so; the message names the key or the stage."""

    exit_code: ClassVar[int] = 83


class Table(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DatasetTable(Table):
    """Where the rows come from; one of folder, files, hub and sample."""

    folder: Path | None = Field(None, description="a dataset that `nightpress dataset prepare` made, used as it is")
    files: tuple[Path, ...] = Field((), description="JSON, JSON lines, CSV, TSV, Parquet or text, or folders of them")
    hub: str | None = Field(None, description="a dataset of the Hugging Face hub")
    config: str | None = Field(None, description="its configuration")
    split: str | None = Field(None, description="its split")
    revision: str | None = Field(None, description="its branch, tag or commit")
    sample: bool = Field(False, description="synthetic rows of the domain")
    domain: str | None = Field(None, description="that the rows are of; the name of the model unless set")
    num_samples: int | None = Field(None, ge=1, examples=[1000], description="rows to draw before cleaning")
    format: str | None = Field(None, description="alpaca, qa, chat or text; recognised unless set")
    map: dict[str, str] = Field(default_factory=dict, description="the column of a part")
    steps: tuple[str, ...] | None = Field(None, examples=[["whitespace", "empty_rows", "near_duplicates"]],
                                           description="cleaning steps in order; the usual ones unless set")
    min_tokens: int = Field(3, ge=0, description="of a row, in words")
    max_tokens: int = Field(2048, ge=1, description="of a row, in words")
    near: float = Field(0.7, ge=0.05, le=1, description="similarity from which rows are near-duplicates")
    shares: tuple[float, float, float] = Field((0.8, 0.1, 0.1), description="of train, validation and test")
    seed: int = Field(0, ge=0, description="another one draws and parts otherwise")
    licence: str = Field("", description="of the data; what its card says unless set")
    strict: bool = Field(False, description="let warnings of the validation fail too")


class ConvertTable(Table):
    """How the merged model becomes a GGUF."""

    outtype: Literal["auto", "f16", "bf16", "f32"] = Field("auto", description="type of the weights")
    parity: bool = Field(True, description="compare base plus adapter, merged model and GGUF")
    llama_cpp: Path | None = Field(None, description="a llama.cpp whose converter to use")


class CalibrateTable(Table):
    """What the importance matrix is made from."""

    matrix: Literal["compare", "own", "none"] = Field(
        "compare", description="compare: the domain's own matrix against the general one and none; own: use it as it "
                               "is; none: the general one where a level needs it")
    chunks: int = Field(128, ge=0, description="most pieces of 512 tokens to collect from; 0 for all")


class PressTable(Table):
    """How the model is pressed, as by `nightpress run`."""

    target_size: str = Field("24GB", description="levels larger than this are not built")
    max_degradation: float = Field(0.07, ge=0, le=1, description="largest loss that passes, as a share")
    levels: tuple[str, ...] = Field((), description="levels, or a ladder: original (unless set), full, iq, knees")
    gates: tuple[str, ...] | None = Field(
        None, examples=[["f1:0.05"]], description="on the validation rows; f1 and answer_perplexity unless set")
    strategy: Literal["walk", "bisect", "refine"] = Field("walk", description="through the levels")
    prefer: Literal["smallest", "score", "score-per-gb"] = Field("smallest", description="of the levels that pass")
    max_kld: float = Field(0.5, ge=0, description="mean KL divergence beyond which a level is rejected")
    evaluation_prompts: int = Field(25, ge=1, description="scenarios at the first look")
    max_prompts: int = Field(0, ge=0, description="most scenarios; 0 for all there are")
    text: Path | None = Field(None, description="your own text for perplexity and KL divergence")
    text_windows: int = Field(0, ge=0, description="most windows of 512 tokens of the text; 0 for all")
    seeds: int = Field(3, ge=0, description="times the original answers by sampling, to know its noise")
    accept_inconclusive: bool = Field(False, description="count what could not be decided as passed")
    release: bool = Field(True, description="release the chosen level")


class EvaluateTable(Table):
    """What is measured on rows that nothing was trained, chosen or calibrated with."""

    enabled: bool = Field(True, description="answer the test rows with the base, the merged model and every level")
    split: Literal["test", "validation"] = Field("test", description="of the dataset")
    limit: int = Field(0, ge=0, description="most rows; 0 for all")
    max_tokens: int = Field(256, ge=1, description="of a reply")


class FinetuneSpec(Table):
    """A whole fine-tuning; `train` and `merge` take the options of `nightpress train` and `nightpress merge`."""

    name: str = Field(description="of the model in the deploy folder, and of this fine-tuning")
    model: str = Field(STARTER, description="a Hugging Face folder, the id of one that was pulled, or starter")
    folder: Path | None = Field(None, description="for all that is made; in the state folder unless set")
    dataset: DatasetTable = Field(default_factory=DatasetTable)
    train: dict[str, Any] = Field(default_factory=dict)
    merge: dict[str, Any] = Field(default_factory=dict)
    convert: ConvertTable = Field(default_factory=ConvertTable)
    calibrate: CalibrateTable = Field(default_factory=CalibrateTable)
    press: PressTable = Field(default_factory=PressTable)
    evaluate: EvaluateTable = Field(default_factory=EvaluateTable)

    @classmethod
    def read(cls, file: Path) -> Self:
        """Return what a file says; relative paths in it start at its folder.

        Raises:
            FinetuneRefused: it cannot be read, or a key or value in it is wrong, naming it.
        """
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
            reason = problem.strerror if isinstance(problem, OSError) else problem
            raise FinetuneRefused(f"{file} cannot be read: {reason}.") from problem
        values.setdefault("name", slug(file.stem))
        return cls.of(values, str(file), file.absolute().parent)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "The order", folder: Path | None = None) -> Self:
        """Return what values say.

        Args:
            values: as in the file.
            where: they stand.
            folder: where relative paths start; None where all are absolute.

        Raises:
            FinetuneRefused: a key or value is wrong.
        """
        try:
            spec = cls.model_validate(values)
        except ValidationError as problem:
            raise FinetuneRefused(_explain(problem, where)) from problem
        check_name(spec.name)
        for table in ("train", "merge"):
            options_of(table, getattr(spec, table), where)
        data = spec.dataset
        named = [name for name in ("folder", "files", "hub", "sample") if getattr(data, name)]
        if len(named) != 1:
            raise FinetuneRefused(f"{where}: [dataset] names {' and '.join(named) or 'no source'}; name one of folder, "
                                  "files, hub and sample.")
        if data.min_tokens > data.max_tokens:
            raise FinetuneRefused(f"{where}: dataset.min_tokens is more than dataset.max_tokens.")
        return spec if folder is None else spec._absolute(folder)

    def _absolute(self, folder: Path) -> Self:
        """Return the same with every path absolute."""
        def there(path: Path | None) -> Path | None:
            return None if path is None else (folder / path.expanduser()).absolute()

        def table(one: Table) -> Table:
            changed: dict[str, Any] = {}
            for name in type(one).model_fields:
                value = getattr(one, name)
                if isinstance(value, Path):
                    changed[name] = there(value)
                elif name == "files":
                    changed[name] = tuple(map(there, value))
            return one.model_copy(update=changed)

        model = self.model
        if model != STARTER and (model.startswith(("~", ".", "/")) or (folder / model).is_dir()):
            model = str(there(Path(model)))
        parts = {name: table(getattr(self, name)) for name in ("dataset", "convert", "press")}
        return self.model_copy(update={"model": model, "folder": there(self.folder), **parts})

    def as_json(self) -> dict[str, Any]:
        """Return what `of` reads."""
        return self.model_dump(mode="json")


def _explain(problem: ValidationError, where: str) -> str:
    first = problem.errors()[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] != "extra_forbidden":
        said = f" is {first['input']!r}" if first["type"] != "missing" else ""
        return f"{where}: {'.'.join(place)}{said}: {first['msg']}."
    table: type[BaseModel] = FinetuneSpec
    if len(place) > 1:
        table = FinetuneSpec.model_fields[place[0]].annotation  # type: ignore[assignment]
    return _unknown(".".join(place), place[-1], list(table.model_fields), where)


def _unknown(place: str, name: str, known: list[str], where: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
    return f"{where}: {place} is no key. {hint}"


def _spec_class(table: str) -> type[Any]:
    """Return the dataclass whose fields a table takes."""
    if table == "train":
        from loops.finetune.plan import TrainSpec

        return TrainSpec
    from daemon.merging import MergeSpec

    return MergeSpec


def options_of(table: str, values: Mapping[str, Any], where: str = "The order") -> dict[str, Any]:
    """Return the options that a table gives to the stage of its name, of the right types.

    Raises:
        FinetuneRefused: one is unknown or wrong.
    """
    if not values:
        return {}
    cls = _spec_class(table)
    known = [one.name for one in fields(cls) if one.name not in _FILLED[table]]
    for name in values:
        if name not in known:
            raise FinetuneRefused(_unknown(f"{table}.{name}", name, known, where))
    required: dict[str, Any] = {one.name: Path() for one in fields(cls)
                                if one.default is MISSING and one.default_factory is MISSING}
    if "adapters" in required:
        required["adapters"] = ()
    try:
        spec = TypeAdapter(cls).validate_python({**required, **values})
    except ValidationError as problem:
        raise FinetuneRefused(_explain(problem, f"{where}: [{table}]")) from problem
    return {name: getattr(spec, name) for name in values}


def template() -> str:
    """Return a file with every key, its default and what it is, commented out but for the first few."""
    lines = ["# A fine-tuning: `nightpress finetune THIS_FILE`. Remove the # before what you change.", "",
             'name = "my-model"  # ' + str(FinetuneSpec.model_fields["name"].description)]
    lines += [f'model = "{STARTER}"  # {FinetuneSpec.model_fields["model"].description}',
              f'# folder = ""  # {FinetuneSpec.model_fields["folder"].description}']
    for name, field in FinetuneSpec.model_fields.items():
        if name in ("name", "model", "folder"):
            continue
        lines += ["", f"[{name}]"]
        if name in _FILLED:
            try:
                cls = _spec_class(name)
            except ImportError:
                continue
            told = _attributes(cls)
            lines += [f"# {one.name} = {_as_toml(one.default)}  # {told[one.name]}" for one in fields(cls)
                      if one.name not in _FILLED[name] and one.default is not MISSING and one.default is not None]
            continue
        table: Any = field.annotation
        lines[-1] += f"  # {(table.__doc__ or '').splitlines()[0]}"
        for key, one in table.model_fields.items():
            if key == "files":
                lines.append(f'files = ["rows.jsonl"]  # {one.description}')
            else:
                default = one.get_default(call_default_factory=True)
                shown = next(iter(one.examples or [""])) if default is None else default
                lines.append(f"# {key} = {_as_toml(shown)}  # {one.description}")
    return "\n".join(lines) + "\n"


def _attributes(cls: type[Any]) -> dict[str, str]:
    """Return what the docstring of a dataclass says of its attributes; several may share a line."""
    lines = re.findall(r"^ {8}([\w, ]+): (.+)$", cls.__doc__ or "", re.MULTILINE)
    return {name.strip(): told.rstrip(".") for names, told in lines for name in names.split(",")}


def _as_toml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_as_toml, value)) + "]"
    if isinstance(value, dict):
        return "{}"
    return json.dumps(str(value) if isinstance(value, Path) else value)
