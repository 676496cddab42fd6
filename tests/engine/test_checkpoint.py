"""Checkpoints: both layouts, sharding over ranks, random weights, what damage is said to be."""

import json
import math
import os
import shutil
import struct
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.schema import RandomShape
from demo.checkpoint import config_json, write_checkpoint
from engine.architecture import Architecture, CheckpointError
from engine.checkpoint import load
from engine.weights import LayerWeights, ModelWeights, random_tensor, random_weights, tensor_specs

SHAPE = RandomShape(
    num_hidden_layers=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    hidden_size=96,
    intermediate_size=160,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    vocab_size=515,
    sliding_window=16,
)
TINY = Architecture.from_random_shape(SHAPE)
# Dimension along which the ranks' shards lie; None: the same on every rank.
SHARDED = {
    "qkv_weight": 0,
    "qkv_bias": 0,
    "sinks": 0,
    "o_weight": 1,
    "gate_up_blocks": 1,
    "gate_up_scales": 1,
    "gate_up_bias": 1,
    "down_blocks": 2,
    "down_scales": 2,
    "lm_head": 0,
}
FIRST_RANK_ONLY = {"o_bias", "down_bias"}
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def named(weights: ModelWeights) -> dict[str, torch.Tensor]:
    tensors = {name: getattr(weights, name) for name in ("embedding", "norm", "lm_head")}
    for n, layer in enumerate(weights.layers):
        tensors |= {f"{n}.{field.name}": getattr(layer, field.name) for field in fields(LayerWeights)}
    return tensors


def assert_same(left: ModelWeights, right: ModelWeights) -> None:
    left, right = named(left), named(right)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def assert_ranks_make(ranks: list[ModelWeights], whole: ModelWeights, a: Architecture) -> None:
    """The ranks' shards side by side are the whole, lm_head's then zeros."""
    shards, heads = [named(rank) for rank in ranks], (a.heads, a.kv_heads, a.kv_heads)
    for path, full in named(whole).items():
        name, parts = path.split(".")[-1], [shard[path] for shard in shards]
        if name in FIRST_RANK_ONLY:
            assert torch.equal(parts[0], full), path
            assert all(part.shape == full.shape and not part.any() for part in parts[1:]), path
        elif name.startswith("qkv"):  # each of q, k and v by itself
            rows = [n // len(ranks) * a.head_dim for n in heads]
            kinds = zip(*[part.split(rows) for part in parts], strict=True)
            assert torch.equal(torch.cat([torch.cat(kind) for kind in kinds]), full), path
        elif name in SHARDED:
            dim = SHARDED[name]
            if name == "lm_head":
                assert len({part.shape for part in parts}) == 1, path
            joined = torch.cat(parts, dim)
            spare = joined.shape[dim] - full.shape[dim]
            assert name == "lm_head" or not spare, path
            assert torch.equal(joined.narrow(dim, 0, full.shape[dim]), full), path
            assert not joined.narrow(dim, full.shape[dim], spare).any(), path
        else:
            assert all(torch.equal(part, full) for part in parts), path


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[..., columns / 32, 16] and [..., columns / 32] uint8 -> [..., columns] float32."""
    nibbles = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)  # the low one is the even element
    values = FP4[(nibbles & 7).long()] * torch.where(nibbles >= 8, -1.0, 1.0)
    return (values * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("huggingface")
    write_checkpoint(folder, TINY, seed=3)
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def load_one(folder: Path) -> ModelWeights:
    return load(folder, 0, 1, "cpu", torch.bfloat16)[1]


# --- what is read


@pytest.mark.parametrize("layout", ["huggingface", "original"])
@pytest.mark.parametrize("shards", [1, 3])
def test_layouts_and_files_hold_the_same_model(written, tmp_path, layout, shards):
    write_checkpoint(tmp_path, TINY, seed=3, layout=layout, shards=shards)
    assert len([*tmp_path.glob("*.safetensors")]) == shards
    architecture, weights = load(tmp_path, 0, 1, "cpu", torch.bfloat16)
    assert architecture == TINY
    assert_same(weights, load_one(written))


@pytest.mark.parametrize("layout", ["huggingface", "original"])
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_side_by_side_are_the_model(written, tmp_path, layout, tp):
    # 5 blocks of intermediate columns and 515 words: neither divides
    write_checkpoint(tmp_path, TINY, seed=3, layout=layout)
    ranks = [load(tmp_path, rank, tp, "cpu", torch.bfloat16)[1] for rank in range(tp)]
    blocks = [rank.layers[0].down_scales.shape[2] for rank in ranks]
    assert max(blocks) - min(blocks) == 1
    assert_ranks_make(ranks, load_one(written), TINY)


def expert(layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    """The first expert's output for x [H], in float64 so that the order of a sum does not show."""
    up = dequantize(layer.gate_up_blocks[0], layer.gate_up_scales[0]).double() @ x + layer.gate_up_bias[0]  # [2 I]
    gate, up = up[::2].clamp(max=7), up[1::2].clamp(-7, 7)
    inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return dequantize(layer.down_blocks[0], layer.down_scales[0]).double() @ inner + layer.down_bias[0]


@pytest.mark.parametrize("tp", [2, 4])
def test_the_ranks_experts_add_up_to_the_models(written, tp):
    x = torch.linspace(-1, 1, 96, dtype=torch.float64)
    parts = [expert(load(written, rank, tp, "cpu", torch.bfloat16)[1].layers[1], x) for rank in range(tp)]
    torch.testing.assert_close(sum(parts), expert(load_one(written).layers[1], x))


def test_a_rank_without_blocks_has_one_of_zeros(tmp_path):
    shape = RandomShape(**{**vars(SHAPE), "intermediate_size": 64})
    a = Architecture.from_random_shape(shape)
    write_checkpoint(tmp_path, a)
    ranks = [load(tmp_path, rank, 4, "cpu", torch.bfloat16)[1] for rank in range(4)]  # 2 blocks, 4 ranks
    for rank, has in enumerate((False, True, False, True)):
        layer = ranks[rank].layers[0]
        assert layer.down_scales.shape[2] == 1
        assert bool(layer.gate_up_blocks.any()) is has
    x = torch.linspace(-1, 1, 96, dtype=torch.float64)
    parts = [expert(rank.layers[1], x) for rank in ranks]
    torch.testing.assert_close(sum(parts), expert(load_one(tmp_path).layers[1], x))


def test_float32_holds_the_same_values(written):
    narrow, wide = named(load_one(written)), named(load(written, 0, 1, "cpu", torch.float32)[1])
    for name, tensor in wide.items():
        assert tensor.dtype == (torch.uint8 if name.endswith(("blocks", "scales")) else torch.float32), name
        assert torch.equal(tensor, narrow[name].to(tensor.dtype)), name


def test_norms_and_sinks_are_float32_and_norms_may_be_stored_so(folder):
    expected = load_one(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    assert_same(load_one(folder), expected)
    assert {expected.norm.dtype, expected.layers[0].mlp_norm.dtype, expected.layers[0].sinks.dtype} == {torch.float32}


def test_the_original_folder_is_found_below(written, tmp_path):
    write_checkpoint(tmp_path / "original", TINY, seed=3, layout="original")
    assert_same(load_one(tmp_path), load_one(written))


def test_unknown_tensors_are_ignored_with_one_warning(folder, caplog):
    save_file({f"extra.{n}": torch.zeros(3) for n in range(2)}, folder / "more.safetensors")
    load_one(folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: ignoring 2 tensors GPT-OSS does not have, the first is extra.0"
    ]


def test_no_progress_bar_without_a_terminal(written, capfd):
    load(written, 0, 1, "cpu", torch.bfloat16, progress=True)
    assert capfd.readouterr() == ("", "")


def test_transformers_loads_it_with_the_same_experts(written):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        written, dtype=torch.bfloat16, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    weights = load_one(written)
    for layer, theirs in zip(weights.layers, model.model.layers, strict=True):
        experts, attention = theirs.mlp.experts, theirs.self_attn
        # theirs are [E, columns, rows]
        for blocks, scales, found in (
            (layer.gate_up_blocks, layer.gate_up_scales, experts.gate_up_proj),
            (layer.down_blocks, layer.down_scales, experts.down_proj),
        ):
            assert torch.equal(dequantize(blocks, scales).bfloat16(), found.transpose(1, 2))
        assert torch.equal(layer.gate_up_bias, experts.gate_up_proj_bias)
        assert torch.equal(layer.router_weight, theirs.mlp.router.weight)
        q, k, v = (getattr(attention, f"{part}_proj") for part in "qkv")
        assert torch.equal(layer.qkv_weight, torch.cat([q.weight, k.weight, v.weight]))
        assert torch.equal(layer.sinks, attention.sinks.float())
    logits = model(torch.arange(40)[None]).logits
    assert logits.shape == (1, 40, 515)
    assert 0.3 < logits.float().std() < 3  # random, yet neither dead nor exploding


# --- random weights


def test_the_same_seed_is_the_same_model():
    first, again, other = (random_weights(TINY, 0, 1, "cpu", torch.bfloat16, seed=seed) for seed in (1, 1, 2))
    assert_same(first, again)
    assert not torch.equal(first.layers[0].down_blocks, other.layers[0].down_blocks)
    assert not torch.equal(first.layers[0].down_blocks, first.layers[1].down_blocks)


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_hold_parts_of_one_model(tp):
    whole = random_weights(TINY, 0, 1, "cpu", torch.bfloat16)
    assert_ranks_make([random_weights(TINY, rank, tp, "cpu", torch.bfloat16) for rank in range(tp)], whole, TINY)


def test_a_written_checkpoint_is_the_random_model(tmp_path):
    write_checkpoint(tmp_path, TINY, seed=5)
    assert_same(load(tmp_path, 0, 1, "cpu", torch.bfloat16)[1], random_weights(TINY, 0, 1, "cpu", torch.bfloat16, 5))


def test_every_nibble_is_as_likely():
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    blocks = random_tensor(name, tensor_specs(TINY)[name], TINY.layers, 0, "cpu")
    for nibbles in (blocks & 15, blocks >> 4):
        for column in nibbles.reshape(-1, 16).T:  # each byte of the eight that one draw fills
            frequency = torch.bincount(column.long(), minlength=16) / len(column)
            assert (frequency - 1 / 16).abs().max() < 0.03


def test_expert_weights_deviate_by_the_root_of_their_fan_in():
    shape = RandomShape(
        num_hidden_layers=9,
        num_local_experts=2,
        num_experts_per_tok=1,
        hidden_size=320,
        intermediate_size=512,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
    )
    layer = random_weights(Architecture.from_random_shape(shape), 0, 1, "cpu", torch.bfloat16).layers[0]
    gate_up = dequantize(layer.gate_up_blocks, layer.gate_up_scales)  # fan-in 320
    down = dequantize(layer.down_blocks, layer.down_scales)  # fan-in 512, and smaller by sqrt(layers) = 3
    for weight, deviation in ((gate_up, 320**-0.5), (down, 512**-0.5 / 3)):
        assert abs(math.log2(weight.std().item() / deviation)) < 0.55  # scales are powers of two
        assert abs(weight.mean()) < 0.01 * deviation + 3 * deviation / math.sqrt(weight.numel())


# --- config.json


def test_published_configs_are_understood():
    a = Architecture.from_random_shape(RandomShape())  # 20b
    assert (a.layers, a.experts, a.windows[:3]) == (24, 32, (128, None, 128))
    assert a.rope_attention_factor == pytest.approx(1.3465736)
    assert a.max_positions == 131072
    published = config_json(a, "huggingface")
    assert (published["eos_token_id"], published["pad_token_id"]) == (200002, 199999)
    newer = {key: value for key, value in published.items() if key not in ("rope_scaling", "rope_theta")}
    newer["rope_parameters"] = {**published["rope_scaling"], "rope_theta": published["rope_theta"]}
    for config in (published, newer, config_json(a, "original")):
        assert Architecture.from_config(config) == a
    assert Architecture.from_config(newer | {"rope_parameters": newer["rope_parameters"] | {"rope_theta": 1e4}}) != a


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type: found 'llama', expected 'gpt_oss'"),
        ({"architectures": ["MixtralForCausalLM"]}, "architectures: found ['MixtralForCausalLM'], expected "),
        ({"quantization_config": None}, "quantization_config.quant_method: found None, expected 'mxfp4'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method: found 'awq', expected "),
        ({"quantization_config": ["mxfp4"]}, "quantization_config.quant_method: found ["),
        ({"layer_types": [["full_attention"], {}]}, "layer_types: found "),
        ({"rope_theta": float("inf")}, "rope_theta: found inf, expected a positive number"),
        ({"hidden_size": 100}, "hidden_size: found 100, expected a multiple of 32"),
        ({"intermediate_size": 48}, "intermediate_size: found 48, expected a multiple of 32"),
        ({"num_attention_heads": 6}, "num_attention_heads: found 6, expected a multiple of num_key_value_heads = 4"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: found '2', expected a positive integer"),
        ({"vocab_size": None}, "vocab_size: found None, expected a positive integer"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: found 5, expected at most the 4 experts"),
        ({"layer_types": ["full_attention"]}, "layer_types: found ['full_attention'], expected 2 of "),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.rope_type: found 'linear', expected 'yarn'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: found True, expected False"),
    ],
)
def test_another_architecture_is_refused_by_field(folder, change, message):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError) as error:
        load_one(folder)
    assert str(error.value).startswith(f"{file}: {message}")


@pytest.mark.parametrize(("tp", "field"), [(3, "num_attention_heads = 8"), (8, "num_key_value_heads = 4")])
def test_heads_must_divide_among_the_ranks(written, tp, field):
    with pytest.raises(CheckpointError, match=f"tp: found {tp}, expected a divisor of {field}"):
        load(written, 0, tp, "cpu", torch.bfloat16)


# --- damage


def change_tensor(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensor = change(tensors.pop(name))
    save_file(tensors if tensor is None else tensors | {name: tensor}, folder / "model.safetensors")


SINKS = "model.layers.1.self_attn.sinks"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: None, f"{{folder}}: {SINKS}: found no such tensor, expected BF16 [8]"),
        (lambda tensor: tensor[:4].clone(), f"{{file}}: {SINKS}: found BF16 [4], expected BF16 [8]"),
        (lambda tensor: tensor.half(), f"{{file}}: {SINKS}: found F16 [8], expected BF16 [8]"),
    ],
)
def test_a_wrong_tensor_is_named_with_found_and_expected(folder, change, message):
    change_tensor(folder, SINKS, change)
    with pytest.raises(CheckpointError) as error:
        load_one(folder)
    assert str(error.value) == message.format(folder=folder, file=folder / "model.safetensors")


def test_a_fused_tensor_of_the_original_layout_is_checked_whole(tmp_path):
    write_checkpoint(tmp_path, TINY, layout="original")
    change_tensor(tmp_path, "block.0.attn.qkv.weight", lambda tensor: tensor[:-32].clone())
    with pytest.raises(CheckpointError, match=r"block.0.attn.qkv.weight: found BF16 \[480, 96\], expected BF16 \[512"):
        load_one(tmp_path)


def test_a_missing_file_is_named_by_the_index(tmp_path):
    write_checkpoint(tmp_path, TINY, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"found no such tensor, expected .* in model-00002-of-00003.safetensors"):
        load_one(tmp_path)


def test_a_tensor_in_two_files_is_an_error(folder):
    shutil.copy(folder / "model.safetensors", folder / "copy.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*: found it in copy.safetensors too"):
        load_one(folder)


def resize(file: Path, size: int) -> None:
    with file.open("r+b") as stream:
        stream.truncate(size)


def test_a_truncated_file_names_the_first_tensor_it_lacks(folder):
    file = folder / "model.safetensors"
    size = file.stat().st_size
    header = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
    names = json.loads(file.read_bytes()[8:header])
    last = max((name for name in names if name != "__metadata__"), key=lambda name: names[name]["data_offsets"][1])
    resize(file, size - 1)
    with pytest.raises(CheckpointError) as error:
        load_one(folder)
    assert str(error.value) == (
        f"{file}: {last}: found {size - 1} bytes in the file (truncated), expected {size} at its end"
    )


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_file_cut_in_its_header_is_an_error(folder, size):
    resize(folder / "model.safetensors", size)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: found {size} bytes \(truncated, or not"):
        load_one(folder)


def test_bytes_too_many_are_an_error(folder):
    file = folder / "model.safetensors"
    size = file.stat().st_size
    resize(file, size + 10)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: found {size + 10} bytes, expected {size}"):
        load_one(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": {"dtype": "BF16"}}',
        b'{"a": 1}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}',
    ],
)
def test_a_broken_header_is_an_error(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=r"model.safetensors: found .*, expected a safetensors header"):
        load_one(folder)


def test_offsets_that_disagree_with_the_shape_are_an_error(folder):
    header = b'{"a": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 4]}}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"abcd")
    with pytest.raises(CheckpointError, match=r"a: found 4 bytes, expected 6 for BF16 \[3\]"):
        load_one(folder)


@pytest.mark.parametrize(("text", "message"), [("{", "expected JSON"), ("[1]", "found list, expected a JSON object")])
def test_a_config_that_is_not_json_is_an_error(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config.json: found .*{message}|config.json: {message}"):
        load_one(folder)


def test_a_path_that_is_no_checkpoint_is_an_error(tmp_path):
    file = tmp_path / "file"
    for path, message in (
        (tmp_path / "absent", "found nothing, expected a checkpoint folder"),
        (tmp_path, r"found an empty folder, expected config.json and \*.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_one(path)
    file.write_text("")
    for path, message in ((file, "found a file, expected a checkpoint folder"), (tmp_path, "found file, expected")):
        with pytest.raises(CheckpointError, match=message):
            load_one(path)


def changed(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


HOSTILE = {
    "deep config": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "huge integer": lambda folder: changed(folder, rope_scaling=None, rope_theta=10**400),
    **{
        f"infinite {field}": lambda folder, field=field: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace(f'"{field}"', f'"{field}": 1e400, "x"')
        )
        for field in ("rms_norm_eps", "rope_theta")
    },
    "config a pipe": lambda folder: ((folder / "config.json").unlink(), os.mkfifo(folder / "config.json")),
    "architectures": lambda folder: changed(folder, architectures=5),
    "layers": lambda folder: changed(folder, num_hidden_layers=3_000_000),
    "long value": lambda folder: changed(folder, layer_types=["x" * 1000] * 1000),
    "shard a folder": lambda folder: (folder / "more.safetensors").mkdir(),
    "shard a pipe": lambda folder: os.mkfifo(folder / "more.safetensors"),
    "shard a dangling link": lambda folder: (folder / "more.safetensors").symlink_to("/nowhere"),
    "deep header": lambda folder: (folder / "more.safetensors").write_bytes(
        (100_000).to_bytes(8, "little") + b"[" * 100_000
    ),
    "infinite offset": lambda folder: (folder / "more.safetensors").write_bytes(
        (57).to_bytes(8, "little") + b'{"x":{"dtype":"U8","shape":[1e999],"data_offsets":[0,1]}}'
    ),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_one_short_line(folder, attack):
    HOSTILE[attack](folder)
    with pytest.raises(CheckpointError) as error:
        load(folder, 0, 1, "cpu", torch.bfloat16)
    assert str(folder) in str(error.value)
    assert len(str(error.value).removeprefix(str(folder))) < 500
    assert "\n" not in str(error.value)


def test_a_sparse_header_is_refused_without_being_read(folder):
    with (folder / "more.safetensors").open("wb") as file:
        file.write((8 * 2**30).to_bytes(8, "little"))
        file.truncate(9 * 2**30)
    with pytest.raises(CheckpointError, match="a header of 8589934592 bytes, expected at most 100000000"):
        load(folder, 0, 1, "cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": [1]}', "no such tensor"),
        ("[1]", "model.safetensors.index.json: found list, expected a JSON object"),
        ("[" * 100_000, "model.safetensors.index.json: found maximum recursion depth exceeded"),
    ],
    ids=["list of files", "list", "deep"],
)
def test_an_index_of_another_form_is_refused_where_a_tensor_is_missing(folder, index, message):
    (folder / "model.safetensors").unlink()
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        load(folder, 0, 1, "cpu", torch.bfloat16)


@pytest.mark.parametrize(("name", "value"), [("norm.weight", math.nan), ("q_proj.weight", math.inf), ("_scales", 255)])
def test_weights_that_are_no_numbers_are_named(folder, name, value):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    wrong = next(tensor for tensor in tensors if tensor.endswith(name))
    tensors[wrong].view(-1)[3] = value
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"{wrong}: found NaN or infinity"):
        load(folder, 0, 1, "cpu", torch.bfloat16)
