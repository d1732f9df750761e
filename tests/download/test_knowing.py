"""`download --info`: what is told of a model before it comes, against transformers, torch and what publishers say."""

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parts import files
from parts import gguf_files as made
from parts.hub import Hub
from parts.public_configs import PUBLIC, headers, row
from torch.utils.flop_counter import FlopCounterMode

from textgen_cli.cli import knowing
from textgen_cli.cli.app import run
from textgen_cli.config import DEFAULT_MODEL, DownloadConfig, ModelConfig
from textgen_cli.config.download import GettingConfig, KeepingConfig, KnowingConfig
from textgen_cli.download.known import KNOWN, USES
from textgen_cli.errors import ModelError, NetworkError, SafetyError, TextgenError, UsageError
from textgen_cli.events import silent
from textgen_cli.model import anatomy, room
from textgen_cli.model.catalog import CATALOG
from textgen_cli.model.family import family_of
from textgen_cli.model.inspect import Facts, inspect, licence_of
from textgen_cli.model.source import parse
from textgen_cli.model.weights import read_header

SmallModel = Callable[..., Path]
NAME = "org/small"
RESULTS = Path(__file__).parents[2] / "docs" / "results.md"
CARD = b"---\nlanguage: en\nlicense: apache-2.0\n---\n# small\nlicense: none\n"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "hf")
        yield hub


def look(name: str | Path, **settings: Any) -> Facts:
    return inspect(ModelConfig(str(name), **settings), silent)


def network(folder: Path) -> Any:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32)


def counted(folder: Path) -> tuple[anatomy.Weights, anatomy.Sizes, Any]:
    config = json.loads((folder / "config.json").read_text())
    found = anatomy.sizes(config)
    assert found is not None
    weights = anatomy.count(read_header(folder / "model.safetensors"), config, family_of(config, "x"))
    return weights, found, network(folder)


# --- parameters, against transformers and publishers


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "bert", "t5", "bert-classifier", "bart-classifier", "bert-tagger"]
)
def test_parameters_are_those_of_the_loaded_network(small_model: SmallModel, kind: str) -> None:
    folder = small_model(kind)
    net = network(folder)
    found = look(folder)
    assert found.weights is not None
    assert found.weights.total == net.num_parameters()
    tables = {
        id(p): p.numel() for m in net.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()
    }
    biases = sum(
        p.numel() for n, p in net.named_parameters() if "relative_attention_bias" in n
    )  # T5: of attention
    assert found.weights.parts["embeddings"] == sum(tables.values()) - biases
    norms = sum(
        p.numel() for n, m in net.named_modules() if type(m).__name__.endswith("Norm") and "cls" not in n
        for p in m.parameters()
    )  # fmt: skip
    assert found.weights.parts["norms"] == norms


@pytest.mark.parametrize("name", PUBLIC)
def test_public_models_have_the_parameters_that_were_published(name: str) -> None:
    public = PUBLIC[name]
    tensors = headers(public.config)
    found = anatomy.sizes(public.config)
    weights = anatomy.count(tensors, public.config, family_of(public.config, name))
    assert found is not None

    def rounded(number: float) -> float:
        return number if public.digits is None else float(f"{number:.{public.digits - 1}e}")

    assert rounded(weights.total) == rounded(public.parameters)
    assert weights.stored == {"F32": 4 * weights.total}
    if public.active is not None:
        assert rounded(weights.active(found)) == public.active
    cache_token = None if public.cache_token is None else 2 * anatomy.cache_elements(found, 1)
    assert cache_token == public.cache_token
    training = None
    if public.training is not None:  # published as 6 operations a parameter and token
        training = 3 * 2 * weights.matrices * public.training[0]
        assert training == pytest.approx(public.training[1], rel=0.02)
    assert row(name, weights.total, cache_token, training) in RESULTS.read_text(encoding="utf-8")


def test_a_window_bounds_the_cache() -> None:
    found = anatomy.sizes(PUBLIC["mistral-7b"].config)
    assert found is not None and found.context is not None
    # Mistral 7B, section 2: at 32k tokens the rolling buffer takes an eighth.
    assert anatomy.cache_elements(found, 32768) * 8 == anatomy.cache_elements(found, 1) * 32768


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_quantised_weights_take_what_is_told(small_model: SmallModel, kind: str, form: Any) -> None:
    from textgen_cli.model import quantize

    weights, _, net = counted(small_model(kind))
    net = net.to(torch.bfloat16)
    quantize.apply(net, form, kind, silent)
    own = [
        *net.parameters(),
        *(b for n, b in net.named_buffers() if not n.endswith(("position_ids", "inv_freq"))),
    ]
    held = {t.data_ptr(): t.numel() * t.element_size() for t in own if t.numel()}
    # A quantised head has a bias of its own, where BERT's had one with two names.
    masks = sum(b.numel() * b.element_size() for n, b in net.named_buffers() if "token_type_ids" in n)
    assert anatomy.weight_bytes(weights)[form] == pytest.approx(sum(held.values()) - masks, rel=1e-2)


# --- memory and work of running, against the library's own cache and torch's counter


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_cache_is_as_large_as_told(small_model: SmallModel, kind: str) -> None:
    _, found, net = counted(small_model(kind))
    with torch.no_grad():
        past = net(torch.arange(1, 22)[None], use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in past.layers)
    assert anatomy.cache_elements(found, 21) == held


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_work_is_what_torch_counts(small_model: SmallModel, kind: str) -> None:
    weights, found, net = counted(small_model(kind))
    net.set_attn_implementation("eager")
    tokens = 33
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.arange(1, tokens + 1)[None])
    # Rotary angles are a small product that the formula leaves out.
    assert tokens * anatomy.flops(weights, found, tokens) == pytest.approx(
        counter.get_total_flops(), rel=2e-3
    )


def test_the_encoder_has_work_of_its_own(small_model: SmallModel) -> None:
    weights, found, net = counted(small_model("t5"))
    net.set_attn_implementation("eager")
    tokens = 20
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.get_encoder()(torch.arange(1, tokens + 1)[None])
    attention = 4 * found.encoder_layers * found.heads * found.key * tokens
    assert tokens * (2 * weights.encoder + attention) == counter.get_total_flops()


# --- from a Hub, before anything is fetched


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_of_a_hub_is_told_without_being_fetched(
    server: Hub, small_model: SmallModel, tmp_path: Path, sharded: bool
) -> None:
    folder = small_model("llama", "{{ messages }}")
    if sharded:
        folder = tmp_path / "shards"
        network(small_model("llama")).save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    server.add(NAME, {p.name: p.read_bytes() for p in folder.iterdir()} | {"README.md": CARD})
    found, local = look(NAME), look(folder)
    assert found.weights == local.weights and found.sizes == local.sizes
    assert found.files and set(found.files) == set(local.files)
    assert (found.licence, local.licence) == ("apache-2.0", None)
    assert found.template == local.template == (not sharded)
    assert not list(tmp_path.rglob("blobs"))
    assert not any(request.method == "HEAD" for request in server.log)


def test_of_large_weights_the_beginning_alone_is_read(server: Hub, tmp_path: Path) -> None:
    size = 64 << 20
    header = {
        "model.embed_tokens.weight": {"dtype": "F32", "shape": [size // 32, 8], "data_offsets": [0, size]}
    }
    whole = files.safetensors(header, bytes(size))
    server.add(
        NAME,
        files.folder(tmp_path / "m", config={"vocab_size": size // 32}, files={"model.safetensors": whole}),
    )
    server.fault("resolve/.*safetensors", cut=size // 2)  # whoever reads on meets the end of the connection
    found = look(NAME)
    assert found.weights is not None and found.weights.total == size // 4
    (asked,) = server.requests("GET", "safetensors")
    assert asked.headers["range"] == f"bytes=0-{len(whole) - 1}"


# --- a GGUF file of a Hub


def gguf_file(*more: bytes, vocabulary: int = 8) -> bytes:
    """A file whose header is long where the words of its vocabulary are."""
    words = made.items(made.STRING, ["x" * (1 << 19)] * vocabulary)
    pairs = [made.pair(f"llama.{name}", made.U32, number) for name, number in SIZES.items()]
    tokens = made.pair("tokenizer.ggml.tokens", made.ARRAY, words)
    rows = [made.row("token_embd.weight", (8, 16)), made.row("output.weight", (8, 16), offset=512)]
    return made.build((made.ARCHITECTURE, *pairs, tokens, *more), rows, data=5 << 20)


SIZES = {"embedding_length": 8, "block_count": 1, "attention.head_count": 2, "context_length": 64}
MANY = {"small-q4.gguf": gguf_file(), "small-q8.gguf": gguf_file(vocabulary=9), "notes.txt": b"n"}


def test_a_gguf_file_of_a_hub_is_told_as_it_would_be_here(server: Hub, tmp_path: Path) -> None:
    whole = MANY["small-q4.gguf"]  # a header of 4 MB: it is read in steps that grow
    (tmp_path / "small-q4.gguf").write_bytes(whole)
    server.add(NAME, {"small-q4.gguf": whole, "README.md": CARD})
    server.fault("resolve/.*gguf", cut=9 << 20)  # what lies far behind the header is never sent
    found, local = look(NAME), look(tmp_path / "small-q4.gguf")
    assert (found.weights, found.sizes, found.files) == (local.weights, local.sizes, local.files)
    assert (found.source, found.licence, local.licence) == ("hub", "apache-2.0", None)
    assert found.fields()["context"] == 64 and not list(tmp_path.rglob("blobs"))
    (asked,) = server.requests("GET", "gguf")
    assert asked.headers["range"] == f"bytes=0-{len(whole) - 1}"


def test_of_several_gguf_files_one_is_chosen(server: Hub, capfdbinary: Any) -> None:
    server.add(NAME, MANY)
    assert run(["download", NAME, "--info"]) == 2
    assert (
        b"has 2 GGUF files" in (told := capfdbinary.readouterr().err) and b"--include small-q4.gguf" in told
    )
    assert run(["download", NAME, "--info", "--json", "--include", "*q8*"]) == 0
    assert json.loads(capfdbinary.readouterr().out)["files"] == [
        {"name": "small-q8.gguf", "size": len(MANY["small-q8.gguf"])}
    ]
    for pattern, code in {"*.txt": 2, "*q9*": 5}.items():
        assert run(["download", NAME, "--info", "--include", pattern]) == code
    assert run(["download", "./here", "--info", "--include", "*"]) == 2


@pytest.mark.parametrize(
    ("content", "answer", "error"),
    [
        (gguf_file()[: -(5 << 20)], {}, ("E-GGUF", "truncated")),  # the list has less of it than its header
        (gguf_file(vocabulary=12), {}, ("E-GGUF", "end of the header")),  # longer than any header may be
        (b"GGML" + bytes(2 << 20), {}, ("E-GGUF", "not a GGUF file")),
        (gguf_file(), {"headers": {"Content-Range": "bytes 0-99/100"}}, ("E-REMOTE", "another size")),
        (gguf_file(), {"headers": {"Content-Range": "bytes 8-99/100"}}, ("E-NETWORK", "another part")),
        (gguf_file(), {"cut": 3 << 20}, ("E-NETWORK", "broke off")),
        (gguf_file(made.pair("split.count", made.U16, 3)), {}, ("E-GGUF", "split into 3")),
    ],
)  # fmt: skip
def test_a_gguf_file_that_lies_or_a_server_that_does(
    server: Hub,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    answer: dict[str, Any],
    error: tuple[str, str],
) -> None:
    monkeypatch.setattr("textgen_cli.model.gguf.MAX_HEADER", 5 << 20)
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.add(NAME, {"small.gguf": content})
    if answer:
        server.fault("resolve/.*gguf", **answer)
    with pytest.raises((ModelError, NetworkError), match=error[1]) as caught:
        look(NAME)
    assert caught.value.name == error[0]


def test_what_is_in_the_cache_is_told_without_a_connection(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from textgen_cli.model import hub

    server.add(NAME, files.folder(tmp_path / "m"))
    with pytest.raises(NetworkError) as caught:
        look(NAME, offline=True)
    assert caught.value.name == "E-OFFLINE"
    online = look(NAME)
    hub.fetch(NAME, None, offline=False, report=silent)

    def refuse(*_: Any) -> None:
        raise AssertionError("a socket is opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert look(NAME, offline=True).fields() == online.fields()
    assert look(f"{NAME}@{online.revision}").weights == online.weights


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model.safetensors": None, "pytorch_model.bin": b"\x80\x04."}, SafetyError("E-PICKLE", "", "")),
        ({"config.json": b'{"model_type": "own", "auto_map": {}}'}, ModelError("E-ARCH", "", "")),
        ({"config.json": b'{"model_type": "own", "auto_map": {"A": "x.X"}}'}, SafetyError("E-REMOTE-CODE", "", "")),
        ({"config.json": b'{"model_type": "llama", "architectures": ["LlamaModel"]}'}, ModelError("E-ARCH", "", "")),
        ({"config.json": b"{"}, ModelError("E-CONFIG", "", "")),
        ({"config.json": None}, ModelError("E-CONFIG", "", "")),
        ({"config.json": None, "adapter_model.safetensors": b"\x00" * 40}, ModelError("E-ADAPTER", "", "")),
        ({"model.safetensors": b"\x00" * 40}, ModelError("E-SAFETENSORS", "", "")),
        ({"model.safetensors": b"\x80\x04."}, SafetyError("E-PICKLE", "", "")),
        ({"model.safetensors": files.tensors({"a": (4,)})[:-3]}, ModelError("E-TRUNCATED", "", "")),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told_before_it_comes(
    server: Hub, tmp_path: Path, changes: dict[str, bytes | None], error: TextgenError
) -> None:
    server.add(NAME, files.folder(tmp_path / "m", files=changes))
    with pytest.raises(type(error)) as caught:
        look(NAME)
    assert caught.value.name == error.name


def test_a_connection_that_breaks_is_tried_again(server: Hub, tmp_path: Path) -> None:
    server.add(NAME, files.folder(tmp_path / "m"))
    server.fault("resolve/.*safetensors", cut=20, times=1)
    assert look(NAME).weights == look(tmp_path / "m").weights


def test_a_small_file_that_is_not_the_listed_one_is_refused(server: Hub, tmp_path: Path) -> None:
    server.add(NAME, files.folder(tmp_path / "m"))
    wrong = (tmp_path / "m/config.json").read_bytes().replace(b"llama", b"gemma")
    server.fault("resolve/.*/config.json", body=wrong)
    with pytest.raises(ModelError) as caught:
        look(NAME)
    assert caught.value.name == "E-HASH"


# --- other sources


def test_a_gguf_file_is_what_it_is_converted_into(tmp_path: Path) -> None:
    from parts.gguf_files import tiny_llama, write_llama

    net = tiny_llama()
    write_llama(tmp_path / "tiny.gguf", net)
    found = look(tmp_path / "tiny.gguf")
    net.save_pretrained(tmp_path / "plain")
    plain, sizes, _ = counted(tmp_path / "plain")
    assert found.weights is not None
    assert (found.weights.parts, found.weights.matrices) == (plain.parts, plain.matrices)
    assert found.sizes == sizes
    assert found.family == "causal" and found.fields()["type"] == "llama"


@pytest.mark.slow
def test_the_default_model_is_known_before_it_comes(default_model: Path, tmp_path: Path) -> None:
    there, absent = look("smollm2-135m-instruct"), look("smollm2-135m-instruct", cache_dir=tmp_path)
    assert there.weights is not None and absent.weights is not None
    assert there.sizes == absent.sizes
    assert (there.weights.parts, there.weights.linear) == (absent.weights.parts, absent.weights.linear)
    assert (there.licence, there.template) == (absent.licence, absent.template) == ("Apache-2.0", True)
    assert not any(tmp_path.iterdir())
    assert there.weights.total == network(default_model).num_parameters()


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (CARD, "apache-2.0"),
        (b"---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        (b"---\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        (b"---\nlicense:\n- cc-by-4.0\n---\n", "cc-by-4.0"),
        (b"---\nlicense: [mit, bsd]\n---\n", "mit"),
        (b"# a model\nlicense: mit\n", None),
        (b"---\nlanguage: en\n---\nlicense: mit\n", None),
        (b"---\nlicense: \x1b[31m\xff\n---\n", None),
    ],
)
def test_the_licence_stands_at_the_head_of_the_card(card: bytes, licence: str | None) -> None:
    assert licence_of(card) == licence


# --- the face


def test_a_pipe_gets_a_fact_a_line_and_a_terminal_round_figures(
    small_model: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = look(small_model("llama")).fields()
    rows = dict(line.rstrip("\n").split("\t") for line in knowing.lines(fields))
    assert rows["parameters.total"] == str(fields["parameters"]["total"])
    assert rows["files.config.json"] == str((small_model("llama") / "config.json").stat().st_size)
    assert rows["licence"] == "–" and rows["chat_template"] == "false"
    monkeypatch.setattr("os.isatty", lambda _: True)
    monkeypatch.setenv("COLUMNS", "60")
    drawn = "".join(knowing.lines(fields))
    assert "48.4 k" in drawn or "parameters" in drawn
    assert all(len(line) <= 60 for line in drawn.splitlines())
    assert "2·M + 4·L·D·T" in drawn


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_file_says_of_itself_cannot_act_or_forge_a_fact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """T25."""
    said = made.pair("general.license", made.STRING, "mit\x1b]52;c;x\x07\nfiles.forged\t1")
    (tmp_path / "x.gguf").write_bytes(gguf_file(said))
    monkeypatch.setattr("os.isatty", lambda _: terminal)
    told = "".join(knowing.lines(look(tmp_path / "x.gguf").fields()))
    assert "mit" in told
    assert not re.search(r"[^\n\t -~–·…×—²]", told), told
    assert not re.search(r"^files.forged", told, re.MULTILINE)


@pytest.mark.parametrize(
    "other", [{"to": Path("x")}, {"lock": Path("x")}, {"dry_run": True}, {"all_files": True}]
)
def test_info_goes_with_nothing_that_fetches(other: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        DownloadConfig(getting=GettingConfig(**other), knowing=KnowingConfig(info=True))
    assert caught.value.name == "E-CONFLICT"
    with pytest.raises(UsageError):
        DownloadConfig(keeping=KeepingConfig(list=True), knowing=KnowingConfig(info=True))


# --- the catalogue


def test_every_model_of_the_catalogue_is_coherent() -> None:
    by_name = {model.name: model for model in KNOWN}
    assert len(by_name) == len(KNOWN) >= 30
    assert {model.use for model in KNOWN} == set(USES)
    for model in KNOWN:
        kind = parse(model.name).kind
        assert kind == ("catalog" if model.name in CATALOG else "hub"), model.name
        assert re.fullmatch(r"https://huggingface\.co/[\w.-]+/[\w.-]+", model.source)
        assert all(language == "many" or re.fullmatch("[a-z]{2}", language) for language in model.languages)
        assert model.languages and model.good_for and re.fullmatch(r"[\w.-]+", model.licence)
        assert model.context is None or 512 <= model.context <= 131_072
        # A licence of the publisher's own is what the Hub asks consent to.
        assert model.gated == (model.licence.startswith(("llama", "gemma"))), model.name
        size = re.search(r"-(\d+(?:\.\d+)?)([mb])\b", model.name.lower())
        if size:  # the name tells it, rounded
            told = float(size[1]) * {"m": 1e6, "b": 1e9}[size[2]]
            assert 0.85 * told < model.parameters < 1.35 * told, model.name
    default = by_name[DEFAULT_MODEL]
    entry = CATALOG[DEFAULT_MODEL]
    assert (default.parameters, default.context, default.licence, default.languages) == (
        entry.parameters, entry.context_length, entry.licence, entry.languages
    )  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "t5-small", "mistral-7b"])
def test_the_catalogue_agrees_with_the_configs(name: str) -> None:
    model = next(model for model in KNOWN if re.search(rf"/{name}(-v0\.1)?$", model.name.lower()))
    config = PUBLIC[name].config
    found = anatomy.count(headers(config), config, family_of(config, name))
    assert model.parameters == found.total
    assert model.context in (anatomy.context_of(config), 512)


def test_the_catalogue_marks_what_fits(monkeypatch: pytest.MonkeyPatch, capfdbinary: Any) -> None:
    def shown(*args: str) -> list[dict[str, Any]]:
        assert run(["download", "--catalog", "--json", *args]) == 0
        return [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]

    rows = shown("instruct")
    assert {row["use"] for row in rows} == {"instruct"}
    assert [row["parameters"] for row in rows] == sorted(row["parameters"] for row in rows)
    assert len(shown()) == len(KNOWN)
    monkeypatch.setattr("textgen_cli.model.room.free", lambda: 4_000_000_000)
    fits = {row["model"]: row["fits"] for row in shown()}
    assert fits[DEFAULT_MODEL] and fits["Qwen/Qwen2.5-1.5B-Instruct"]
    assert not fits["mistralai/Mistral-7B-v0.1"]
    assert run(["download", "--catalog", "poems"]) == 2
    assert b"one of base, instruct" in capfdbinary.readouterr().err


def test_free_memory_is_what_the_system_tells() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = room.free()
    assert found is not None and 0 < found <= total
