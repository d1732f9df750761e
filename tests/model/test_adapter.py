"""Adapters that peft itself made, against peft's own model; and every way in which one can be bad."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from parts.hub import Hub
from safetensors.torch import load_file, save_file

from textgen_cli.config import ModelConfig, split_weight
from textgen_cli.errors import TextgenError, UsageError
from textgen_cli.events import Event, Notice, silent
from textgen_cli.model import adapter
from textgen_cli.model.load import Model, load
from textgen_cli.model.source import Located, Source

CLASSES = {"t5": transformers.AutoModelForSeq2SeqLM, "bert": transformers.AutoModelForMaskedLM}
IDS = torch.arange(20, 74).view(2, 27)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own


def plain(folder: Path) -> Any:
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    kind = CLASSES.get(model_type, transformers.AutoModelForCausalLM)
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def make(folder: Path, base: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter with random weights, saved by peft."""
    torch.manual_seed(seed)
    lora = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings})
    made = peft.get_peft_model(plain(base), lora)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "modules_to_save" in name or ("lora_" not in name and parameter.requires_grad):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    made.save_pretrained(str(folder))
    return folder


def logits(net: Any) -> torch.Tensor:
    extra = {"decoder_input_ids": IDS} if net.config.is_encoder_decoder else {}
    with torch.inference_mode():
        found: torch.Tensor = net(input_ids=IDS, **extra).logits
    return found


def ours(base: Path, *adapters: str, dtype: Any = "float32", **settings: Any) -> Model:
    config = ModelConfig(model=str(base), device="cpu", dtype=dtype, adapter=adapters, **settings)
    return load(config, "generate", silent)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": "all-linear", "use_rslora": True}),
        (
            "llama",
            {
                "target_modules": r".*\.(gate|up)_proj",
                "rank_pattern": {"up_proj": 2},
                "alpha_pattern": {"up_proj": 1},
            },
        ),
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        (
            "llama",
            {"target_modules": ["down_proj"], "modules_to_save": ["lm_head"], "layers_to_transform": [1]},
        ),
        ("llama", {"target_modules": ["o_proj"], "use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["lm_head"]}),  # shares its table with the embeddings
        ("t5", {"target_modules": ["q", "v", "wo"]}),
        ("bert", {"target_modules": ["query", "dense"]}),
    ],
    ids=str,
)
def test_logits_are_those_of_peft(
    small_model: Callable[..., Path], tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    base = small_model(architecture)
    folder = make(tmp_path / "lora", base, **settings)
    reference = peft.PeftModel.from_pretrained(plain(base), folder).eval()
    expected, exact = logits(reference), logits(reference.double())
    found = ours(base, str(folder))
    assert type(found.net) is type(plain(base))
    scale = float(expected.abs().max())
    own_error = float(
        (expected - exact).abs().max()
    )  # of peft's float32, which is large where a softmax is steep
    torch.testing.assert_close(logits(found.net), expected, rtol=0, atol=max(1e-5 * scale, 2 * own_error))
    assert (logits(plain(base)) - expected).abs().max() > 1e-2 * scale  # the adapter does something


def test_several_are_the_weighted_sum_of_their_changes(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = small_model("llama")
    one = make(tmp_path / "one", base, seed=1, target_modules=["q_proj", "v_proj"])
    two = make(tmp_path / "two", base, seed=2, target_modules=["q_proj", "down_proj"], r=3, lora_alpha=5)
    expected = plain(base)
    for folder, weight, factor in ((one, 0.5, 8 / 4), (two, -1.25, 5 / 3)):
        tensors = load_file(folder / WEIGHTS)
        for key in tensors:
            if key.endswith("lora_A.weight"):
                layer = expected.get_submodule(
                    key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                )
                change = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
                layer.weight.data += weight * factor * change
    found = ours(base, f"{one}=0.5", f"{two}=-1.25").net
    for (name, mine), (_, theirs) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, msg=name)


def test_the_sum_is_rounded_once(small_model: Callable[..., Path], tmp_path: Path) -> None:
    base = small_model("llama")
    names = [str(make(tmp_path / str(seed), base, seed=seed, target_modules=["q_proj"])) for seed in (1, 2)]
    half = ours(base, *names, dtype="bfloat16").net
    full = ours(base, *names).net
    start = plain(base)
    for name, parameter in half.named_parameters():
        assert parameter.dtype == torch.bfloat16
        exact = (
            full.get_parameter(name)
            - start.get_parameter(name)
            + start.get_parameter(name).bfloat16().float()
        )
        assert (parameter - exact).abs().max() <= 2**-8 * exact.abs().max(), name


def test_weight_nought_is_the_base(small_model: Callable[..., Path], tmp_path: Path) -> None:
    base = small_model("gpt2")
    folder = make(tmp_path / "lora", base, target_modules=["c_attn"], fan_in_fan_out=True)
    torch.testing.assert_close(logits(ours(base, f"{folder}=0").net), logits(plain(base)), rtol=0, atol=0)


def test_an_adapter_may_be_quantised_with_its_base(small_model: Callable[..., Path], tmp_path: Path) -> None:
    base = small_model("llama")
    folder = str(make(tmp_path / "lora", base, target_modules=["q_proj"]))
    exact, quantised = logits(ours(base, folder).net), logits(ours(base, folder, quantize="int8").net)
    assert (exact - quantised).abs().max() < 0.1 * (exact - logits(plain(base))).abs().max()


# --- bad adapters


def settle(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        stored = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**stored, **changes}))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        edit(found)
        save_file(found, folder / WEIGHTS)

    return change


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])


def linked_away(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/etc/hostname")


def pickled(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

BAD: dict[str, tuple[Callable[[Path], Any], int, str, str]] = {
    "missing key": (tensors(lambda t: t.pop(FIRST)), 5, "E-ADAPTER", f"1 missing keys: {FIRST}"),
    "alien key": (tensors(lambda t: t.update(x=torch.ones(1))), 5, "E-ADAPTER", "1 alien keys: x"),
    "other shape": (tensors(lambda t: t.update({FIRST: torch.ones(4, 47)})), 5, "E-ADAPTER", "(4, 47)"),
    "NaN": (tensors(lambda t: t[FIRST].fill_(torch.nan)), 5, "E-ADAPTER", "NaN"),
    "rank 0": (settle(r=0), 5, "E-ADAPTER", "rank 0"),
    "rank too large": (settle(r=10**9), 5, "E-ADAPTER", "rank 1000000000"),
    "rank a word": (settle(r="4"), 5, "E-ADAPTER", "rank 4"),
    "rank of a layer": (settle(rank_pattern={"q_proj": -1}), 5, "E-ADAPTER", "rank -1"),
    "other rank": (settle(r=5), 5, "E-ADAPTER", "shape"),
    "alpha NaN": (settle(lora_alpha=float("nan")), 5, "E-ADAPTER", "lora_alpha nan"),
    "alpha of a layer": (settle(alpha_pattern={"q_proj": float("inf")}), 5, "E-ADAPTER", "lora_alpha inf"),
    "pattern no map": (settle(rank_pattern=[1]), 5, "E-ADAPTER", "not a map"),
    "targets nothing": (settle(target_modules=["nothing"]), 5, "E-ADAPTER", "nothing"),
    "slow pattern": (settle(target_modules="(a+)+$"), 5, "E-ADAPTER", "pattern"),
    "no pattern": (settle(target_modules="("), 5, "E-ADAPTER", ""),
    "other kind": (settle(peft_type="IA3"), 5, "E-ADAPTER", "of type IA3"),
    "changed base": (settle(init_lora_weights="pissa"), 5, "E-ADAPTER", "start of training"),
    "unknown feature": (settle(layer_replication=[[0, 1]]), 5, "E-ADAPTER", "layer_replication"),
    "feature of later": (settle(brand_new=True), 5, "E-ADAPTER", "brand_new"),
    "imports a module": (settle(megatron_config={}, megatron_core="os"), 6, "E-REMOTE-CODE", "imported"),
    "no settings": (lambda f: (f / CONFIG).unlink(), 5, "E-ADAPTER", f"no {CONFIG}"),
    "settings cut": (lambda f: (f / CONFIG).write_text("{"), 5, "E-ADAPTER", "not JSON"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), 5, "E-ADAPTER", f"no {WEIGHTS}"),
    "pickle only": (pickled, 6, "E-PICKLE", "pickle"),
    "pickle by name": (lambda f: torch.save({}, f / WEIGHTS), 6, "E-PICKLE", "calls itself"),
    "weights cut": (cut, 5, "E-TRUNCATED", "bytes"),
    "weights leave": (linked_away, 6, "E-PATH", "leaves"),
    "no folder": (shutil.rmtree, 5, "E-MODEL", "no such folder"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(small_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("good") / "lora", small_model("llama"), target_modules=["q_proj"])


@pytest.mark.parametrize(("spoil", "code", "name", "fact"), BAD.values(), ids=BAD)
def test_a_bad_adapter_is_refused(
    small_model: Callable[..., Path], good: Path, tmp_path: Path, spoil: Any, code: int, name: str, fact: str
) -> None:
    folder = shutil.copytree(good, tmp_path / "lora")
    spoil(folder)
    with pytest.raises(TextgenError) as caught:
        ours(small_model("llama"), str(folder))
    assert (caught.value.exit_code, caught.value.name) == (code, name)
    assert fact in caught.value.fact


def test_weights_that_are_replaced_go_alone(
    small_model: Callable[..., Path], good: Path, tmp_path: Path
) -> None:
    base = small_model("llama")
    dora = make(tmp_path / "dora", base, target_modules=["q_proj"], use_dora=True)
    for names in ([f"{dora}=0.5"], [str(dora), str(good)]):
        with pytest.raises(TextgenError, match="alone") as caught:
            ours(base, *names)
        assert caught.value.name == "E-ADAPTER"


def test_another_base_with_its_own_embeddings_is_seen(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = small_model("llama")
    folder = make(tmp_path / "lora", base, target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors(lambda t: t.update({key: t[key] + 1}))(folder)
    with pytest.raises(TextgenError, match="another base_model"):
        ours(base, str(folder))


@pytest.mark.parametrize("key", ["auto_mapping", "runtime_config", "loftq_config"])
def test_what_names_code_or_files_is_not_read(
    small_model: Callable[..., Path], good: Path, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = shutil.copytree(good, tmp_path / "lora")
    settle(**{key: {"parent_library": "evil", "base_model_class": "Evil"}})(folder)
    ours(small_model("llama"), str(folder))
    assert not (tmp_path / "canary").exists()


# --- the base


def at(kind: Any, name: str, revision: str = "") -> Located:
    return Located(Path("/nowhere"), Source(kind, name), revision, name)


BASES: list[tuple[Located, Any, str]] = [
    (at("hub", "org/base"), "org/base", "silent"),
    (at("hub", "org/base"), "Org/Base", "silent"),
    (at("hub", "org/base"), None, "silent"),
    (at("hub", "org/base"), 7, "silent"),
    (at("hub", "org/base"), "evil/other", "error"),
    (at("hub", "org/base"), "/home/someone/base", "notice"),
    (at("hub", "gpt2"), "openai-community/gpt2", "notice"),
    (at("folder", "./base"), "./base", "silent"),
    (at("folder", "./base"), "evil/other", "notice"),
    (at("catalog", "smollm2-135m-instruct"), "org/base", "notice"),
]


@pytest.mark.parametrize(("base", "named", "answer"), BASES, ids=str)
def test_the_base_that_is_named_is_compared(base: Located, named: Any, answer: str) -> None:
    events: list[Event] = []
    if answer == "error":
        with pytest.raises(TextgenError, match="E-ADAPTER") as caught:
            adapter._check_base("lora", named, base, events.append)
        assert named in caught.value.fact and base.label in caught.value.fact
    else:
        adapter._check_base("lora", named, base, events.append)
    assert len(events) == (answer == "notice")
    assert all(isinstance(event, Notice) and not event.name for event in events)


def test_no_request_goes_to_the_named_base(
    small_model: Callable[..., Path], good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(good, tmp_path / "lora")
    settle(base_model_name_or_path="evil/other", revision="main")(folder)
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path)
        ours(small_model("llama"), str(folder))
        assert not hub.log


def test_an_adapter_of_the_hub_is_fetched_and_is_no_model(
    small_model: Callable[..., Path], good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small_model("llama")
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path)
        hub.add("org/lora", good)
        fetched = logits(ours(base, "org/lora=0.5").net)
        with pytest.raises(TextgenError, match=r"E-ADAPTER.*not a whole model"):
            load(ModelConfig(model="org/lora"), "generate", silent)
        hub.add("org/pickle", {CONFIG: (good / CONFIG).read_bytes(), "adapter_model.bin": b"x"})
        with pytest.raises(TextgenError, match="E-PICKLE"):
            ours(base, "org/pickle")
    torch.testing.assert_close(fetched, logits(ours(base, f"{good}=0.5").net), rtol=0, atol=0)
    torch.testing.assert_close(fetched, logits(ours(base, "org/lora=0.5", offline=True).net), rtol=0, atol=0)


OLD, NEW = "a" * 40, "b" * 40


@pytest.mark.parametrize(
    ("stamp", "revision", "refused"),
    [
        ({"base": "org/base", "revision": OLD}, NEW, True),
        ({"base": "org/base", "revision": OLD}, OLD, False),
        ({"base": "org/base", "revision": OLD}, "", False),
        ({"base": "org/base", "revision": ""}, NEW, False),
        ({"base": "org/base"}, NEW, False),
    ],
)
def test_a_base_that_moved_on_is_named_with_both_commits(
    stamp: dict[str, Any], revision: str, refused: bool
) -> None:
    base = at("hub", "org/base", revision)
    if not refused:
        adapter._check_stamp("lora", stamp, base)
        return
    with pytest.raises(TextgenError) as caught:
        adapter._check_stamp("lora", stamp, base)
    assert caught.value.name == "E-ADAPTER"
    assert OLD in caught.value.fact and NEW in caught.value.fact
    assert caught.value.hint == f"use -m org/base@{OLD}"


# --- the option


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("./lora", ("./lora", 1.0)),
        ("org/lora=0.5", ("org/lora", 0.5)),
        ("org/lora@main=-2", ("org/lora@main", -2.0)),
        ("./a=b", ("./a=b", 1.0)),
        ("./a=b=1e-3", ("./a=b", 0.001)),
    ],
)
def test_the_weight_stands_behind_the_last_sign(text: str, expected: tuple[str, float]) -> None:
    assert split_weight(text) == expected


@pytest.mark.parametrize("text", ["./lora=nan", "./lora=inf", "./lora=-1e9"])
def test_a_weight_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="E-RANGE"):
        ModelConfig(adapter=(text,))


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "x.gguf"])
def test_a_whole_model_is_no_adapter(small_model: Callable[..., Path], name: str) -> None:
    with pytest.raises(UsageError, match="E-ADAPTER"):
        ours(small_model("llama"), name)
