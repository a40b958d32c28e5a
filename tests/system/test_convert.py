"""`nightpress convert` through the real command line: real folders, llama.cpp's real converter, both forms read."""

from __future__ import annotations

import json
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from loops.engine.gguf_check import check_gguf, read_header

needs_extra = pytest.mark.skipif(find_spec("torch") is None or find_spec("transformers") is None
                                 or find_spec("peft") is None, reason="needs nightpress[train]")


@pytest.fixture(scope="session")
def forms(isolated_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `Tiny`, an `adapter` for it and both `merged`; read them, never write to them."""
    from hf_model import make_adapter, make_model

    folder = tmp_path_factory.mktemp("forms")
    make_adapter(make_model(folder / "Tiny"), folder / "adapter", folder / "merged")
    return folder


@pytest.fixture
def tiny(forms: Path, tmp_path: Path) -> Path:
    """A copy of the model to change."""
    return Path(shutil.copytree(forms / "Tiny", tmp_path / "Tiny"))


def left(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if "convert" in file.name or file.suffix == ".gguf")


@pytest.mark.slow
@needs_extra
def test_a_model_is_converted_and_says_the_same(nightpress: Any, forms: Path, scripts: Path) -> None:
    call = ("convert", str(forms / "Tiny"), "--llama-cpp", str(scripts), "--outtype", "f16")
    found = json.loads(nightpress(*call, "--json").stdout)
    file = nightpress.base / "Tiny-F16.gguf"
    assert (found["path"], found["type"], found["kind"]) == (str(file), "F16", "model")
    stage, = found["stages"]
    assert (stage["stage"], stage["tokens"]) == ("conversion", 256)
    assert 0 < stage["mean_kl"] < 1e-5
    assert all("too small for F16" in note for note in found["notes"])
    metadata = check_gguf(file).metadata
    assert metadata["general.name"] == "Tiny"
    assert "<|assistant|>" in str(metadata["tokenizer.chat_template"])
    assert left(nightpress.base) == [file.name]
    assert "--force" in nightpress(*call, "-o", str(file), status=74).stderr
    assert left(nightpress.base) == [file.name]


@pytest.mark.slow
@needs_extra
def test_an_adapter_is_converted_and_a_merge_is_compared(nightpress: Any, forms: Path, scripts: Path) -> None:
    common = ("--llama-cpp", str(scripts), "--base", str(forms / "Tiny"), "--json")
    made = json.loads(nightpress("convert", str(forms / "adapter"), *common).stdout)
    assert made["kind"] == "adapter"
    assert made["stages"][0]["stage"] == "conversion of the adapter"
    assert read_header(Path(made["path"])).metadata["general.type"] == "adapter"
    merged = json.loads(nightpress("convert", str(forms / "merged"), "--adapter", str(forms / "adapter"),
                                   *common).stdout)
    assert [stage["stage"] for stage in merged["stages"]] == ["merging", "conversion"]
    assert left(nightpress.base) == ["adapter-adapter-F32.gguf", "merged-BF16.gguf"]


@pytest.mark.slow
@needs_extra
def test_a_wrong_merge_is_refused_by_name_and_nothing_is_written(nightpress: Any, forms: Path, scripts: Path,
                                                                 tmp_path: Path) -> None:
    from hf_model import change_tensor

    merged = Path(shutil.copytree(forms / "merged", tmp_path / "merged"))
    change_tensor(merged, "model.layers.1.mlp.down_proj.weight", lambda weights: weights * 1.05)
    done = nightpress("convert", str(merged), "--base", str(forms / "Tiny"), "--adapter", str(forms / "adapter"),
                      "--llama-cpp", str(scripts), status=101)
    assert "Stage merging changed the model" in done.stderr
    assert left(nightpress.base) == []


@pytest.mark.slow
@needs_extra
@pytest.mark.parametrize(("file", "old", "new", "status", "said"), [
    ("conversion/llama.py", ".swapaxes(1, 2)\n                .reshape(weights.shape))", ".reshape(weights.shape))",
     101, "Stage conversion changed the model"),
    ("gguf-py/gguf/vocab.py", "gw.add_chat_template(", "(lambda _template: None)(", 97, "chat template"),
])
def test_a_wrong_conversion_is_refused_by_name(nightpress: Any, forms: Path, scripts: Path, tmp_path: Path, file: str,
                                               old: str, new: str, status: int, said: str) -> None:
    broken = Path(shutil.copytree(scripts, tmp_path / "llama.cpp"))
    source = (broken / file).read_text(encoding="utf-8")
    assert old in source
    (broken / file).write_text(source.replace(old, new, 1), encoding="utf-8")
    done = nightpress("convert", str(forms / "Tiny"), "--llama-cpp", str(broken), "--outtype", "f16", status=status)
    assert said in done.stderr
    assert done.stderr.startswith("nightpress: Stage conversion")
    assert left(nightpress.base) == []


@pytest.mark.slow
@needs_extra
def test_pickles_are_read_only_on_request_and_nothing_in_them_runs(nightpress: Any, tiny: Path, scripts: Path) -> None:
    import torch
    from safetensors.torch import load_file

    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (tiny / "it-ran",)

    torch.save(load_file(tiny / "model.safetensors"), tiny / "pytorch_model.bin")
    (tiny / "model.safetensors").unlink()
    call = ("convert", str(tiny), "--llama-cpp", str(scripts))
    assert "--allow-pickle" in nightpress(*call, status=98).stderr
    found = json.loads(nightpress(*call, "--allow-pickle", "--json").stdout)
    assert found["stages"][0]["same_top"] > 0.9
    Path(found["path"]).unlink()
    torch.save({"w": torch.zeros(1), "x": Hostile()}, tiny / "pytorch_model.bin")
    assert "refused" in nightpress(*call, "--allow-pickle", status=98).stderr
    assert not (tiny / "it-ran").exists()
    assert left(nightpress.base) == []


@pytest.mark.slow
@needs_extra
def test_code_in_the_folder_does_not_run(nightpress: Any, tiny: Path, scripts: Path, tmp_path: Path) -> None:
    gullible = Path(shutil.copytree(scripts, tmp_path / "llama.cpp"))
    script = gullible / "convert_hf_to_gguf.py"
    source = script.read_text(encoding="utf-8")
    assert "import argparse\n" in source
    script.write_text(source.replace("import argparse\n", (
        "import argparse, pathlib, runpy, sys\n"
        "[runpy.run_path(file) for file in pathlib.Path(sys.argv[1]).glob('*.py')]\n"
    ), 1), encoding="utf-8")
    (tiny / "own.py").write_text(f"open({str(tiny / 'it-ran')!r}, 'w').close()\nclass Own: pass\n", encoding="utf-8")
    for name, maps in (("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
                       ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", None]})):
        fields = json.loads((tiny / name).read_text(encoding="utf-8"))
        (tiny / name).write_text(json.dumps({**fields, "auto_map": maps}), encoding="utf-8")
    nightpress("convert", str(tiny), "--llama-cpp", str(gullible))
    assert not (tiny / "it-ran").exists()


@pytest.mark.slow
@needs_extra
def test_an_interrupted_conversion_goes_on_after_what_was_finished(nightpress: Any, forms: Path, scripts: Path,
                                                                   poll: Any) -> None:
    call = ("convert", str(forms / "Tiny"), "--llama-cpp", str(scripts))
    with nightpress.start(*call) as process:
        poll(lambda: list(nightpress.base.glob(".nightpress-convert-*/converted.json")), 120, "the conversion")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    made, = nightpress.base.glob(".nightpress-convert-*/model.gguf")
    before = made.stat()
    found = json.loads(nightpress(*call, "--json").stdout)
    after = Path(found["path"]).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert left(nightpress.base) == ["Tiny-BF16.gguf"]


@pytest.mark.slow
@needs_extra
def test_a_file_before_gguf_is_converted_and_computes_the_same(nightpress: Any, scripts: Path, tmp_path: Path) -> None:
    from ggjt_file import write_ggjt
    from hf_model import make_model

    from loops.engine.options import EngineOptions
    from loops.finetune import parity, reading
    from loops.finetune.model_folder import read_folder

    model = make_model(tmp_path / "Tiny", heads=4)
    write_ggjt(model, tmp_path / "old.bin")
    found = json.loads(nightpress("convert", str(tmp_path / "old.bin"), "--llama-cpp", str(scripts), "--eps", "1e-5",
                                  "--context", "512", "--json").stdout)
    assert (found["kind"], found["stages"]) == ("legacy", [])
    original = reading.read_with_torch(read_folder(model), tmp_path / "r", "x", (), lambda _done, _total: None)
    kept = reading.load(tmp_path / "r")
    assert kept is not None
    _, logits = reading.read_with_engine(Path(found["path"]), original, EngineOptions(), "y")
    parity.compare("legacy", kept[1], logits, parity.EXACT)


@pytest.mark.slow
@needs_extra
def test_bad_input_is_one_sentence_and_leaves_nothing(nightpress: Any, tiny: Path, scripts: Path) -> None:
    from hf_model import change_tensor

    def refused(status: int, *options: str) -> str:
        done = nightpress("convert", str(tiny), "--llama-cpp", str(scripts), *options, status=status)
        sentences = [line for line in done.stderr.splitlines() if line.startswith("nightpress: ")]
        assert len(sentences) == 1, done.stderr
        assert left(nightpress.base) == []
        return str(sentences[0])

    assert "lacks" in nightpress("convert", str(tiny), "--llama-cpp", str(tiny), status=99).stderr
    config = (tiny / "config.json").read_text(encoding="utf-8")
    (tiny / "config.json").write_text(config.replace("LlamaForCausalLM", "LlamaForCausalLN"), encoding="utf-8")
    assert "LlamaForCausalLM" in refused(95)
    (tiny / "config.json").write_text(config.replace('"hidden_size": 64', '"hidden_size": 72'), encoding="utf-8")
    assert "llama.embedding_length is 72" in refused(100)
    (tiny / "config.json").write_text(config, encoding="utf-8")
    tokenizer = (tiny / "tokenizer.model").read_bytes()
    (tiny / "tokenizer.model").write_bytes(tokenizer[:1000])
    refused(100)
    (tiny / "tokenizer.model").unlink()
    assert "no tokenizer" in refused(96)
    (tiny / "tokenizer.model").write_bytes(tokenizer)
    (tiny / "config.json").write_text(config.replace('"vocab_size": 3072', '"vocab_size": 3000'), encoding="utf-8")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        change_tensor(tiny, name, lambda weights: weights[:3000])
    assert "has 3,072 tokens and the model only 3,000" in refused(97)
    with (tiny / "model.safetensors").open("r+b") as stream:
        stream.truncate(500_000)
    assert "cut off" in refused(105)
    (tiny / "config.json").unlink()
    assert "config.json" in refused(94)


@pytest.mark.skipif(find_spec("torch") is not None, reason="nightpress[train] is installed")
def test_without_the_extra_the_command_says_how_to_install_it(nightpress: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "tokenizer.json").write_text("{}")
    header = b'{"w":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    done = nightpress("convert", str(tmp_path), status=93)
    assert done.stderr.strip().count("\n") == 0
    assert "pip install 'nightpress[train]'" in done.stderr
    assert left(nightpress.base) == []
