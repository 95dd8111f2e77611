"""Files of pruned models: what comes back, how small they are, and that no damaged or foreign file is taken."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import safetensors
import safetensors.torch
import scipy.sparse
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from repro.errors import ReproError
from repro.models.speech import SpeechConfig, SpeechModel
from repro.pruning import GradualPruner, HardPrune
from repro.sparse import positions
from repro.sparse.exports import to_scipy, to_torch_csr
from repro.sparse.files import FORMAT, VERSION, load, save
from repro.sparse.storage import stored_bytes

DTYPES = (torch.float16, torch.float32, torch.float64, torch.bfloat16)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
GAPS = bytes([1, 0b01000000, 0b10010000])  # of non-zeros at 0 and 6: r = 1, low bits 0 1, quotients 0 2
DENSITIES = (0.0, 0.003, 0.1, 0.4, 0.6, 1.0)


def pruned(rows, columns, density, seed=0, dtype=torch.float32):
    """A Gaussian matrix with each weight kept with probability `density`."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return (weights * (torch.rand(rows, columns, generator=generator) < density)).to(dtype)


def masks(size, density, seed=0):
    return np.random.default_rng(seed).random(size) < density


def same_bits(a, b):
    """Also tells 0.0 from -0.0 and one NaN from another."""
    integers = INTEGERS[a.dtype.itemsize]
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared by the examples of a property, which overwrite each other's files."""
    return tmp_path_factory.mktemp("files")


# Codes of positions


@given(arrays.arrays(bool, st.integers(0, 200)), st.sampled_from([None, *positions.INDEXES]))
@example(np.zeros(0, bool), None)
@example(np.zeros(9, bool), "gaps")
@example(np.ones(9, bool), "gaps")
def test_positions_come_back_from_every_code(mask, index):
    used, code = positions.encode(mask, index)
    assert used == (index or used) and code.dtype == np.uint8
    np.testing.assert_array_equal(positions.decode(used, code, mask.size, mask.sum()), np.flatnonzero(mask))


@settings(max_examples=40)
@given(st.integers(1, 50_000), st.sampled_from([1e-4, 1e-3, 0.02, 0.1, 0.3, 0.5, 0.9]), st.integers(1, 30), st.booleans())
def test_size_of_gaps_is_bounded_wherever_the_nonzeros_are(size, density, run, shuffled):
    """k (1 + r) + (n - k) / 2^r bits for every r, here also of runs of equal entries, as pruned rows and blocks make them."""
    mask = np.repeat(masks(size, density, run), run)[:size]
    if shuffled:
        np.random.default_rng(run).shuffle(mask)
    used, code = positions.encode(mask, "gaps")
    n, k = mask.size, int(mask.sum())
    np.testing.assert_array_equal(positions.decode(used, code, n, k), np.flatnonzero(mask))
    assert all(8 * (code.size - r - 2) <= k * (1 + r) + (n - k) / 2**r for r in range(17))


def test_the_code_of_a_small_mask_is_what_the_definition_says():
    """Gaps 0, 5, 2, 0, 7. With r = 1: quotients 0 2 1 0 3 in unary 1 001 01 1 0001; low bits 0 1 0 0 1."""
    mask = np.zeros(24, bool)
    mask[[0, 6, 9, 10, 18]] = True
    used, code = positions.encode(mask, "gaps")
    assert used == "gaps"
    assert code.tolist() == [1, 0b01001000, 0b10010110, 0b00100000]


@pytest.mark.parametrize("zeros", [0.5, 0.55, 0.62, 0.7, 0.786, 0.85, 0.9, 0.95, 0.98, 0.99])
def test_random_positions_take_their_entropy_and_a_few_percent(zeros):
    """No prefix code of single gaps does better than 4.2 % at 62 % zeros; a bound that undercut 1 would be no bound."""
    mask = masks(500_000, 1 - zeros)
    entropy = stored_bytes(mask.size, mask.sum(), value_bytes=0, index="entropy")
    allowed = 1.044 if zeros < 0.7 else 1.035 if zeros < 0.85 else 1.028
    assert 0.999 <= positions.encode(mask)[1].size / entropy <= allowed


@given(st.integers(0, 300), st.sampled_from(DENSITIES), st.integers(0, 99))
def test_the_smaller_code_is_taken(size, density, seed):
    mask = masks(size, density, seed)
    sizes = {index: positions.encode(mask, index)[1].size for index in positions.INDEXES}
    assert positions.encode(mask)[1].size == min(sizes.values())


@settings(max_examples=300)
@given(st.integers(1, 80), st.sampled_from(DENSITIES), st.integers(0, 9), st.sampled_from(positions.INDEXES), st.data())
def test_any_bytes_decode_to_valid_positions_or_are_refused(size, density, seed, index, data):
    """What a made-up file may hold never leads outside the matrix, nor twice to one weight: codes with bytes changed."""
    mask = masks(size, density, seed)
    code = positions.encode(mask, index)[1].copy()
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, code.size - 1), st.integers(0, 255)), max_size=3)):
        code[at] = byte
    size, count = size - data.draw(st.integers(0, 1)), max(int(mask.sum()) + data.draw(st.integers(-1, 1)), 0)
    try:
        found = positions.decode(index, code, size, count)
    except ReproError:
        return
    assert found.size == count and np.all(np.diff(found) > 0)
    assert count == 0 or (found[0] >= 0 and found[-1] < size)


@pytest.mark.parametrize(
    ("code", "size", "count"),
    [
        (GAPS, 6, 2),  # one too few: the untouched code reaches position 6
        (GAPS, 7, 1),
        (GAPS, 7, 3),
        (GAPS[:2], 7, 2),
        (b"", 7, 0),
        (bytes([70, *[0] * 66, 0x80, 0, 0, 0, 0x80]), 7, 1),  # bit 66 of a gap: 64-bit arithmetic would lose it
        (bytes([62, *[0xFF] * 62, 0b10101010, 0b10101010]), 2**62, 8),  # a sum of 2^65 would come round to a small one
    ],
)
def test_gaps_that_reach_too_far_are_refused(code, size, count):
    with pytest.raises(ReproError):
        positions.decode("gaps", np.frombuffer(code, np.uint8), size, count)


def test_bitmaps_of_another_size_are_refused():
    code = np.array([0b10000001, 0], np.uint8)
    assert positions.decode("bitmap", code, 9, 2).tolist() == [0, 7]
    for size in (8, 17):
        with pytest.raises(ReproError, match=f"a bitmap of {size} weights takes"):
            positions.decode("bitmap", code, size, 2)


# What comes back


@settings(max_examples=150)
@given(
    st.sampled_from([(1, 1), (1, 300), (300, 1), (0, 5), (5, 0), (40, 30), (64, 64), (6, 5, 40), (2, 3, 3, 50)]),
    st.sampled_from(DENSITIES),
    st.sampled_from(DTYPES),
    st.sampled_from([None, "gaps", "bitmap"]),
    st.sampled_from([None, "float32"]),
    st.integers(0, 99),
)
def test_weights_come_back_to_the_bit(folder, shape, density, dtype, index, values, seed):
    """Of all shapes, densities and types; "float32" widens no 16-bit weight, and rounds float64 where it codes it."""
    weights = pruned(shape[0], int(np.prod(shape[1:])), density, seed, dtype).reshape(shape)
    report = save({"w": weights, "twin": weights.clone()}, folder / "w", index=index, values=values)
    loaded = load(folder / "w")
    expected = weights + 0  # -0.0 becomes 0.0
    if dtype == torch.float64 and values and report.matrices:
        expected = expected.float().double()
    assert set(loaded) == {"w", "twin"}
    assert same_bits(loaded["w"] + 0, expected) and same_bits(loaded["twin"] + 0, expected)
    assert report.file == (folder / "w").stat().st_size
    assert report.dense == 2 * weights.nbytes
    if values is None or dtype.itemsize <= 4:
        assert all(matrix.values == matrix.nonzero * dtype.itemsize for matrix in report.matrices.values())


def test_special_values(tmp_path):
    """NaN (with its bits), infinities and subnormal weights are non-zeros; -0.0 is a zero and comes back as 0.0."""
    weights = pruned(60, 50, 0.1)
    weights[3, :6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45, -0.0, 0.0])
    weights[3, 5:6].view(torch.int32)[0] = 0x7FC12345
    assert weights[3, 5].isnan() and weights[3, 4].signbit()
    assert save({"w": weights}, tmp_path / "w").matrices["w"].nonzero == weights.count_nonzero()
    assert same_bits(load(tmp_path / "w")["w"], weights.where(weights != 0, 0.0))


def test_everything_else_in_a_state_dict_survives(tmp_path):
    """Running statistics, counters, flags, scalars, empty, strided and shared tensors; a pruned matrix among them."""
    base, full = pruned(80, 60, 0.1), pruned(80, 80, 1.0)
    norm = torch.nn.BatchNorm1d(7)
    norm(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
    state = {
        **norm.state_dict(prefix="norm."),
        "pruned": base,
        "transposed": base.T,
        "part": base[::2, 1::3],
        "overlapping": base[10:70],
        "full": full,
        "full, transposed": full.T,
        "full, its beginning": full[:10],
        "full, overlapping": full[10:70],
        "vector": torch.tensor([0.0, -0.0, 1.0]),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "integers": torch.arange(4000).reshape(50, 80) % 2,
        "empty": torch.zeros(0, 3),
        "other empty": torch.zeros(0, 3),
        "complex": torch.tensor([1 + 2j]).conj(),
        "expanded": torch.zeros(1).expand(40, 50),
        "grün:'\"\\": pruned(80, 60, 0.1, seed=1),
    }
    report = save(state, tmp_path / "state")
    loaded = load(tmp_path / "state")
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
        assert loaded[name].is_contiguous()
    assert set(report.matrices) == {"pruned", "transposed", "part", "overlapping", "expanded", "grün:'\"\\"}
    assert torch.signbit(loaded["vector"]).tolist() == [False, True, False]


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(50, 40), torch.nn.Linear(40, 50))
    model[1].weight = model[0].weight
    alone = save(model[0], tmp_path / "alone")
    both = save(model, tmp_path / "both")
    assert both.dense == alone.dense + 200
    loaded = load(tmp_path / "both")
    assert loaded["0.weight"].data_ptr() == loaded["1.weight"].data_ptr()
    other = torch.nn.Sequential(torch.nn.Embedding(50, 40), torch.nn.Linear(40, 50))
    other.load_state_dict(loaded)
    assert torch.equal(other[1].weight, model[1].weight)


@pytest.mark.parametrize("cell", ["rnn", "gru"])
def test_a_pruned_speech_model_comes_back_and_says_the_same(tmp_path, cell):
    """Trained for a step, hard-pruned, saved from one model and loaded into another."""
    torch.manual_seed(0)
    config = SpeechConfig(cell, hidden=48, layers=2, channels=4)
    model = SpeechModel(config)
    features, lengths = torch.randn(2, 60, config.bins), torch.tensor([60, 44])
    model(features, lengths)[0].square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    pruner = GradualPruner(model, HardPrune(0.9, at=1), grouping="layer")
    pruner.step()
    pruner.step()
    report = save(model, tmp_path / "model")
    assert all(
        report.matrices[name].nonzero == mask.count_nonzero() <= 0.101 * mask.numel() for name, mask in pruner.masks.items()
    )
    assert len(pruner.masks) >= 6
    torch.manual_seed(1)
    other = SpeechModel(config)
    other.load_state_dict(load(tmp_path / "model"))
    for one, same in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, same)
    with torch.no_grad():
        assert torch.equal(model.eval()(features, lengths)[0], other.eval()(features, lengths)[0])


# Values of fewer bytes


@settings(max_examples=60)
@given(
    st.integers(20, 60),
    st.integers(100, 300),
    st.sampled_from(DTYPES),
    st.sampled_from([1e-42, 1e-36, 1.0, 1e4]),
    st.integers(0, 9),
)
def test_int8_errors_are_at_most_half_a_step_of_their_row(folder, rows, columns, dtype, magnitude, seed):
    """|error| <= scale / 2, scale = max|w| / 127 (at least the smallest normal number), and rounding to the matrix's type."""
    weights = (pruned(rows, columns, 0.1, seed, torch.float64) * magnitude).to(dtype)
    report = save({"w": weights}, folder / "w", values="int8")
    loaded = load(folder / "w")["w"]
    assert loaded.dtype == dtype
    if "w" not in report.matrices:  # the smallest, or all zero
        assert torch.equal(loaded, weights)
        return
    scale = (weights.double().abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    info = torch.finfo(dtype)
    rounding = 2 * max(info.eps, torch.finfo(torch.float32).eps) * weights.double().abs() + info.tiny * info.eps
    error = (loaded.double() - weights.double()).abs()
    assert torch.all(error <= scale / 2 + rounding)
    assert torch.all(loaded.sign() * weights.sign() >= 0) and torch.all(loaded[weights == 0] == 0)
    if magnitude == 1.0:  # not because nothing was rounded
        assert error.max() > scale.min() / 8


def test_int8_keeps_the_largest_of_each_row_and_its_sign(tmp_path):
    weights = torch.zeros(30, 200)
    weights[:, 7] = torch.linspace(-3, 5, 30)
    weights[:, 100] = weights[:, 7] / 1000  # rounds to zero, which must not move its neighbour
    weights[0, 7] = 3e38
    save({"w": weights}, tmp_path / "w", values="int8")
    loaded = load(tmp_path / "w")["w"]
    torch.testing.assert_close(loaded[:, 7], weights[:, 7], rtol=1e-6, atol=0)
    assert not loaded[:, 100].any()


def test_float16_values_are_rounded_to_nearest_and_come_back_in_their_own_type(tmp_path):
    weights = pruned(50, 60, 0.1)
    save({"w": weights, "bias": weights[0] + 0.1}, tmp_path / "w", values="float16")
    loaded = load(tmp_path / "w")
    assert not torch.equal(loaded["w"], weights)
    assert same_bits(loaded["w"] + 0, weights.half().float() + 0)
    assert torch.equal(loaded["bias"], weights[0] + 0.1)


@pytest.mark.parametrize(
    ("values", "special"),
    [
        ("float16", 7e4),
        ("int8", float("nan")),
        ("int8", float("inf")),
        ("float32", 1e300),
        ("int8", 1e300),
        ("int8", 2.0**128 - 2.0**104),
    ],
)
def test_values_that_would_be_lost_are_refused_and_the_old_file_stays(tmp_path, values, special):
    weights = pruned(50, 60, 0.1, dtype=torch.float64)
    save({"w": weights}, tmp_path / "w", values=values)
    before = (tmp_path / "w").read_bytes()
    weights[4, 5] = special
    with pytest.raises(ReproError, match=rf"'w' holds values beyond {values}"):
        save({"w": weights}, tmp_path / "w", values=values)
    assert (tmp_path / "w").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_float16_keeps_infinities_and_nan(tmp_path):
    weights = pruned(50, 60, 0.1)
    weights[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    save({"w": weights}, tmp_path / "w", values="float16")
    assert str(load(tmp_path / "w")["w"][0, :3].tolist()) == "[nan, inf, -inf]"


# Sizes


@pytest.mark.parametrize(("values", "value_bytes", "limit"), [("float32", 4, 1.005), ("float16", 2, 1.01), ("int8", 1, 1.05)])
def test_at_90_percent_a_file_is_the_information_minimum_and_a_few_percent(tmp_path, values, value_bytes, limit):
    """Below 1.15, also of the whole file; the report's numbers follow from the closed forms."""
    weights = pruned(512, 1024, 0.1)
    report = save({"w": weights}, tmp_path / "w", values=values)
    matrix, n, k = report.matrices["w"], weights.numel(), int(weights.count_nonzero())
    assert matrix.dense == report.dense == 4 * n
    assert matrix.values == report.values == stored_bytes(n, k, value_bytes=value_bytes)
    assert matrix.minimum == report.minimum == stored_bytes(n, k, value_bytes=value_bytes, index="entropy")
    assert (matrix.nonzero, matrix.shape, matrix.index) == (k, (512, 1024), "gaps")
    assert 1 < matrix.ratio == matrix.file / matrix.minimum <= limit
    assert matrix.file < report.file == (tmp_path / "w").stat().st_size <= 1.01 * limit * report.minimum


def test_a_bitmap_takes_one_bit_per_weight(tmp_path):
    weights = pruned(100, 83, 0.3)
    matrix = save({"w": weights}, tmp_path / "w", index="bitmap").matrices["w"]
    assert matrix.file == stored_bytes(8300, matrix.nonzero, index="bitmap") + 0.5  # 8300 bits are 1037.5 bytes


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.sampled_from(DENSITIES)), max_size=4),
    st.sampled_from([None, "float32", "float16", "int8"]),
    st.sampled_from(DTYPES),
    st.sampled_from(["w", "a.rather.long.name.of.a.layer", "übergrößenträger" * 4]),
)
def test_no_model_takes_more_than_its_plain_file_and_our_manifest(folder, shapes, values, dtype, prefix):
    state = {f"{prefix}{i}": pruned(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)}
    report = save(state, folder / "w", values=values, skip_below=0.0)
    assert report.file <= len(safetensors.torch.save(state)) + 180


def test_matrices_with_few_zeros_stay_as_they_are(tmp_path):
    """No weight of an unpruned layer is rounded; `skip_below` says what counts as pruned."""
    weights = pruned(200, 300, 0.95)
    assert not save({"w": weights}, tmp_path / "w", values="int8").matrices
    assert same_bits(load(tmp_path / "w")["w"], weights)
    assert save({"w": weights}, tmp_path / "w", values="int8", skip_below=0.04).matrices


def test_the_file_is_a_safetensors_file_and_always_the_same(tmp_path):
    """Other tools can open it; two saves of one model are equal to the byte."""
    state = {"w": pruned(50, 60, 0.1), "v": pruned(50, 60, 0.2), "bias": torch.ones(3)}
    for name in ("one", "two"):
        save(state, tmp_path / name, values="int8")
    with safetensors.safe_open(tmp_path / "one", "pt") as file:
        parts = {f"{name}:{part}" for name in "wv" for part in ("values", "positions", "scales")}
        assert set(file.keys()) == parts | {"bias"}
        assert list(file.metadata()) == [FORMAT]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


# Damage


@pytest.fixture(scope="module")
def small_file(folder):
    path = folder / "small"
    save({"w": pruned(30, 40, 0.1), "u": pruned(30, 40, 0.7), "bias": torch.ones(3)}, path, values="int8")
    return path.read_bytes()


def refused(path, data, match=None):
    path.write_bytes(data)
    with pytest.raises(ReproError, match=match) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_every_changed_byte_is_noticed(tmp_path, small_file):
    """All of the header and every seventh byte behind it, changed in one bit and in all."""
    header = 8 + int.from_bytes(small_file[:8], "little")
    assert len(small_file) > header + 700
    for at in [*range(header), *range(header, len(small_file), 7), len(small_file) - 1]:
        for flip in (1 << at % 8, 0xFF):
            refused(tmp_path / "w", small_file[:at] + bytes([small_file[at] ^ flip]) + small_file[at + 1 :])


def test_cut_and_lengthened_files_are_refused(tmp_path, small_file):
    header = 8 + int.from_bytes(small_file[:8], "little")
    for length in range(0, header, 11):
        refused(tmp_path / "w", small_file[:length], "not a safetensors file, or is damaged or cut off within its header")
    for length in (header, header + 1, len(small_file) - 1):
        refused(tmp_path / "w", small_file[:length], f"cut off: {length:,} of {len(small_file):,} bytes")
    refused(tmp_path / "w", small_file + b"\0", "checksum")


def test_files_of_others_are_refused(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "pickle")
    refused(tmp_path / "pickle", (tmp_path / "pickle").read_bytes(), "not a safetensors file")
    for text in (b"", b"[]", b"\x02\0\0\0\0\0\0\0[]", b"\x04\0\0\0\0\0\0\0null", b"\xff" * 50, b"[" * 5000):
        refused(tmp_path / "text", text, "not a safetensors file")
    state = {"w": torch.ones(3)}
    refused(tmp_path / "plain", safetensors.torch.save(state), "did not write")
    refused(tmp_path / "theirs", safetensors.torch.save(state, {"format": "pt"}), "did not write")
    for nonsense in ("{}", "[]", "1", "", '{"version": "1", "sha256": ""}'):
        refused(tmp_path / "near", safetensors.torch.save(state, {FORMAT: nonsense}), "damaged")
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(ReproError, match=f"cannot read {missing}"):
            load(missing)


def forged(tensors, matrices, tied=(), version=VERSION):
    """A file with a valid checksum whatever it holds."""
    manifest = {"version": version, "sha256": "0" * 64, "matrices": matrices, "tied": dict(tied)}
    data = safetensors.torch.save(tensors, {FORMAT: json.dumps(manifest, separators=(",", ":"))})
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


def test_files_with_a_right_checksum_and_wrong_contents_are_refused(tmp_path):
    """No index leads outside a matrix, whoever made the file; the untouched one is read."""
    code = torch.tensor(list(GAPS), dtype=torch.uint8)
    good = {"w:values": torch.tensor([1.0, 2.0]), "w:positions": code}
    entry = {"shape": [1, 7], "dtype": "float32", "index": "gaps"}
    (tmp_path / "w").write_bytes(forged(good, {"w": entry}))
    assert load(tmp_path / "w")["w"].tolist() == [[1, 0, 0, 0, 0, 0, 2]]
    entries = [
        {"shape": [1, 6]},
        {"shape": [0, 7]},
        {"shape": [-1, -7]},
        {"shape": [-1, 7]},
        {"shape": [2**31, 2**31]},
        {"shape": [1.5, 7]},
        {"shape": None},
        {"shape": 7},
        {"dtype": "int64"},
        {"dtype": None},
        {"index": "bitmap"},
        {"index": "csr"},
        {"index": []},
    ]
    contents = [
        {"w:values": torch.ones(1)},
        {"w:values": torch.ones(3)},
        {"w:values": torch.ones(2, 3)},
        {"w:scales": torch.ones(0)},
        {"w:positions": code[:0]},
        {"w:positions": code[:1]},
        {"w:positions": torch.full((3,), 255, dtype=torch.uint8)},
        {"w:positions": code.float()},
        {"w:positions": torch.tensor([1, 0b01000000, 0b10000000, 1], dtype=torch.uint8)},
    ]
    wrong = [(good, {"w": entry | change}) for change in entries]
    wrong += [(good | change, {"w": entry}) for change in contents]
    wrong += [({"w:values": good["w:values"]}, {"w": entry}), (good, {"w": None}), (good, {"w": {}}), (good, [])]
    for tensors, matrices in wrong:
        refused(tmp_path / "w", forged(tensors, matrices), "wrong contents")
    refused(tmp_path / "w", forged(good, {"w": entry}, {"v": "x"}), "wrong contents")
    refused(tmp_path / "w", forged(good, {"w": entry}, version=VERSION + 1), f"version {VERSION + 1} .* update")


class WithExtraState(torch.nn.Module):
    def get_extra_state(self):
        return "anything"


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda path: save({}, path, values="float8"), "unknown values 'float8': choose one of float32, float16, int8"),
        (lambda path: save({}, path, index="csr"), "unknown index 'csr': choose one of gaps, bitmap"),
        (lambda path: save({}, path, skip_below=90), r"skip_below is 90: it must lie in \[0, 1\]"),
        (lambda path: save(WithExtraState(), path), "cannot store '_extra_state'"),
        (lambda path: save(torch.nn.LazyLinear(3), path), "cannot store 'weight'"),
        (lambda path: save(torch.nn.Linear(3, 3, device="meta"), path), "cannot store 'weight'"),
        (lambda path: save({"w": to_torch_csr(torch.eye(3))}, path), "cannot store 'w'"),
        (lambda path: save({"w": torch.ones(3, dtype=torch.complex128)}, path), "complex128"),
        (lambda path: save({"__metadata__": torch.ones(3)}, path), "__metadata__"),
        (lambda path: save({"w": pruned(50, 60, 0.1), "w:values": torch.ones(3)}, path), "'w:values': rename"),
        (lambda path: save({"w:values": torch.ones(3), "w": pruned(50, 60, 0.1)}, path), "'w:values': rename"),
        (lambda path: to_scipy(torch.ones(3)), r"shape \(3,\)"),
        (lambda path: to_torch_csr(np.ones((2, 2, 2))), r"shape \(2, 2, 2\)"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, call, complaint):
    with pytest.raises(ReproError, match=complaint):
        call(tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_sizes_are_frozen(tmp_path):
    """And a file of nothing is a file."""
    report = save({}, tmp_path / "w")
    assert load(tmp_path / "w") == {} and report.ratio == float("inf")
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.file = 1


# Exports


@given(
    st.sampled_from([(1, 1), (1, 30), (30, 1), (0, 5), (5, 0), (12, 17)]),
    st.sampled_from(DENSITIES),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 9),
)
def test_exports_hold_the_same_matrix_with_four_byte_indices(shape, density, dtype, as_parameter, seed):
    """Row by row, columns increasing, zeros left out, from tensors that need a gradient too."""
    weights = pruned(*shape, density, seed, dtype)
    weights = torch.nn.Parameter(weights) if as_parameter else weights
    torch_csr, scipy_csr = to_torch_csr(weights), to_scipy(weights)
    plain = weights.detach()
    assert torch_csr.layout == torch.sparse_csr and torch_csr.dtype == dtype and torch_csr.shape == plain.shape
    assert torch_csr.crow_indices().dtype == torch_csr.col_indices().dtype == torch.int32
    assert torch.equal(torch_csr.to_dense(), plain)
    assert torch_csr.values().numel() == scipy_csr.nnz == plain.count_nonzero()
    assert isinstance(scipy_csr, scipy.sparse.csr_array) and scipy_csr.indices.dtype == scipy_csr.indptr.dtype == np.int32
    assert scipy_csr.has_canonical_format
    np.testing.assert_array_equal(scipy_csr.toarray(), plain.float().numpy() if dtype.itemsize == 2 else plain.numpy())
    np.testing.assert_array_equal(scipy_csr.indices, torch_csr.col_indices().numpy())
    np.testing.assert_array_equal(scipy_csr.indptr, torch_csr.crow_indices().numpy())


def test_exports_of_arrays_transposes_and_negative_zeros():
    weights = np.array([[0.0, 2.0], [-0.0, np.nan], [3.0, 0.0]], dtype=np.float32).T
    for indices, pointers, values in [
        (to_scipy(weights).indices, to_scipy(weights).indptr, to_scipy(weights).data),
        (to_torch_csr(weights).col_indices(), to_torch_csr(weights).crow_indices(), to_torch_csr(weights).values()),
    ]:
        assert indices.tolist() == [2, 0, 1] and pointers.tolist() == [0, 1, 3]
        np.testing.assert_array_equal(np.asarray(values), [3, 2, np.nan])


def test_exported_products_equal_the_dense_one():
    weights, x = pruned(40, 30, 0.2), torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(to_torch_csr(weights) @ x, weights @ x)
    np.testing.assert_allclose(to_scipy(weights) @ x.numpy(), (weights @ x).numpy(), rtol=1e-5, atol=1e-6)
