"""Methods that are a tuner of PEFT: the layer against its equation in matrix algebra, its scale, merging, and other adapters."""

import pytest
import torch
from tiny_options import TINY
from torch import nn

from nora_vision.factors import low_rank_factors
from nora_vision.weight_change import best_low_rank, weight_change
from pipelines import adapter_files
from pipelines.adapter_method import ADAPTER_NAME, trained_parameters
from pipelines.adapter_options import AdapterOptions
from pipelines.methods import method_named, method_names
from pipelines.methods.fourierft import INDICES
from pipelines.methods.randlora import BASES
from pipelines.native_files import read_native, write_native
from pipelines.peft_method import PeftMethod
from pipelines.scalable_layers import ScalableLayer

M, N, RANK, ALPHA = 24, 16, 4, 6.0
ONE = ADAPTER_NAME


def block_diagonal(blocks):
    """diag(blocks), for blocks (k, b, b)."""
    count, size, _ = blocks.shape
    whole = torch.zeros(count * size, count * size, dtype=blocks.dtype)
    for place, block in enumerate(blocks):
        whole[place * size : (place + 1) * size, place * size : (place + 1) * size] = block
    return whole


def cayley(Q):
    """(I - Q) (I + Q)^-1, which is orthogonal for a skew-symmetric Q."""
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype)
    rotation = (identity - Q) @ torch.linalg.inv(identity + Q)
    torch.testing.assert_close(rotation @ rotation.mT, identity.expand_as(rotation))
    return rotation


def skew(entries, size):
    """Q = U - U^T, for the entries of U above its diagonal, row by row."""
    Q = torch.zeros(*entries.shape[:-1], size, size, dtype=entries.dtype)
    rows, columns = torch.triu_indices(size, size, 1)
    Q[..., rows, columns] = entries
    return Q - Q.mT


def butterfly(size, block, level):
    """Of every 2^level blocks, all first halves and then all second halves of pairs: pairs at a distance become neighbours."""
    half, group = block // 2, 2**level * block
    order = []
    for start in range(0, size, group):
        halves = [range(begin, begin + half) for begin in range(start, start + group, half)]
        order += [place for places in halves[0::2] + halves[1::2] for place in places]
    return torch.eye(size, dtype=torch.float64)[order]


def changed_loha(layer, W):
    factors = [getattr(layer, f"hada_{name}")[ONE] for name in ("w1_a", "w1_b", "w2_a", "w2_b")]
    return W + ALPHA / RANK * (factors[0] @ factors[1]) * (factors[2] @ factors[3])


def changed_lokr(layer, W):
    C, B, A = layer.lokr_w1[ONE], layer.lokr_w2_a[ONE], layer.lokr_w2_b[ONE]
    return W + ALPHA / RANK * torch.cat([torch.cat([entry * (B @ A) for entry in row], dim=1) for row in C])


def changed_hra(layer, W):
    for u in layer.hra_u[ONE].T:
        W = W @ (torch.eye(N, dtype=W.dtype) - 2 * torch.outer(u, u) / u.square().sum())
    return W


def changed_oft(layer, W):
    return W @ block_diagonal(cayley(skew(layer.oft_R[ONE].weight, TINY["block_size"]))).T


def changed_boft(layer, W):
    rotation = torch.eye(N, dtype=W.dtype)
    for level, blocks in enumerate(layer.boft_R[ONE]):
        P = butterfly(N, TINY["block_size"], level)
        rotation = P @ block_diagonal(cayley((blocks - blocks.mT) / 2)) @ P.T @ rotation
    return layer.boft_s[ONE] * (W @ rotation.T)


def changed_psoft(layer, W):
    U, S, Vh = torch.linalg.svd(W)
    R = layer.psoft_R[ONE]
    rotation = cayley(-skew(R.weight, RANK))
    signs = torch.sign((layer._psoft_A_cache[ONE] * Vh[:RANK]).sum(dim=1))
    A, B = signs[:, None] * Vh[:RANK], U[:, :RANK] * S[:RANK] * signs
    return W + B @ (torch.diag(R.vector_b) @ rotation @ torch.diag(R.vector_a) - torch.eye(RANK)) @ A


def changed_miss(layer, W):
    return W + layer.miss_block[ONE].T @ torch.eye(RANK, dtype=W.dtype).repeat(1, N // RANK)


def changed_delora(layer, W):
    A, B, bound = layer.delora_A[ONE], layer.delora_B[ONE], layer.delora_lambda[ONE]
    terms = [torch.outer(b, a) / (b.norm() * a.norm()) for b, a in zip(B.T, A, strict=True)]
    return W + bound / RANK * sum(terms) * W.norm(dim=0)


def changed_ia3(layer, W):
    return W * layer.ia3_l[ONE].flatten()


def changed_randlora(layer, W):
    A, B = layer.randlora_A[ONE][:, 0, :N].double(), layer.randlora_B[ONE][:M].reshape(M, RANK, -1).double()
    scales = zip(layer.randlora_lambda[ONE].T, layer.randlora_gamma[ONE], strict=True)
    terms = [B[:, :, i] @ torch.diag(of_rank) @ A @ torch.diag(of_input) for i, (of_rank, of_input) in enumerate(scales)]
    return W + ALPHA / RANK * sum(terms)


def changed_fourierft(layer, W):
    """The inverse transform as a sum of plane waves."""
    rows, columns = torch.arange(M, dtype=torch.float64)[:, None], torch.arange(N, dtype=torch.float64)
    terms = [
        value * torch.cos(2 * torch.pi * (u * rows / M + v * columns / N))
        for value, u, v in zip(layer.fourierft_spectrum[ONE], *layer.indices[ONE], strict=True)
    ]
    return W + layer.fourierft_scaling[ONE] * sum(terms) / (M * N)


def changed_c3a(layer, W):
    """Row i of a circulant block is its vector, shifted by i places."""

    def circulant(vector):
        return torch.stack([torch.roll(vector, places) for places in range(len(vector))])

    rows = [torch.cat([circulant(vector) for vector in row], dim=1) for row in layer.c3a_kernel[ONE]]
    return W + torch.cat(rows) / N


def changed_gralora(layer, W):
    """Block (i, j) is B_i[j] A_j[i]^T, with B_i and A_j in k parts of rank r / k."""
    A, B = layer.gralora_A[ONE], layer.gralora_B[ONE]
    k = len(A)
    part = RANK // k

    def block(i, j):
        left, right = B[i][j * part : (j + 1) * part], A[j][:, i * part : (i + 1) * part]
        return left.T @ right.T

    return W + ALPHA / RANK * torch.cat([torch.cat([block(i, j) for j in range(k)], dim=1) for i in range(k)])


# Methods whose layers share trained parameters or projections have tests of their own.
PEFT_METHODS = [name for name in method_names() if PeftMethod in method_named(name).__bases__]


def options(method):
    return AdapterOptions(method=method, rank=RANK, alpha=ALPHA, decompose_factor=2, target_modules=["layer"], **TINY)


def disturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters({"": model}):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def adapted(method, seed=0):
    """A linear layer with a bias under an adapter with random values, in float64, and the layer without it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(N, M)}).requires_grad_(False)
    options(method).create().add(model, ["layer"], torch.Generator().manual_seed(seed))
    disturb(model, seed)
    return model.double(), model["layer"].get_base_layer()


X = torch.randn(5, N, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
# PEFT computes some changes in float32 whatever the precision of the layer.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
methods = pytest.mark.parametrize("method", PEFT_METHODS)


@methods
@torch.no_grad()
def test_the_output_is_that_of_the_equation(method):
    model, base = adapted(method)
    weight = globals()[f"changed_{method}"](model["layer"], base.weight)
    assert (weight - base.weight).norm() > 1e-3 * base.weight.norm()
    expected = X @ weight.T + base.bias
    for shape in ((5,), (1, 5), (5, 1), (5, 1, 1), (1, 5, 1, 1)):
        torch.testing.assert_close(model["layer"](X.reshape(*shape, N)), expected.reshape(*shape, M), **CLOSE)


@methods
@torch.no_grad()
def test_a_scale_of_one_half_adds_half_of_the_change_in_use_and_merged(method):
    model, base = adapted(method)
    layer, before = model["layer"], base.weight.clone()
    expected = base(X) + 0.5 * (layer(X) - base(X))
    assert isinstance(layer, ScalableLayer)
    layer.set_scale(ONE, 0.5)
    torch.testing.assert_close(layer(X), expected, **CLOSE)
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(X), expected, **CLOSE)
    torch.testing.assert_close(base(X), expected, **CLOSE)
    layer.unmerge()
    assert torch.equal(base.weight, before)
    torch.testing.assert_close(layer(X), expected, **CLOSE)


@methods
@torch.no_grad()
def test_changes_of_two_adapters_add_up_in_use_and_merged_and_each_can_be_deleted(method):
    model, base = adapted(method)
    layer = model["layer"]
    first = layer(X) - base(X)
    model.float()
    options(method).create().add(model, ["layer"], torch.Generator().manual_seed(1), "other")
    layer.set_adapter(["other"])
    disturb(model, 1)
    model.double()
    second = layer(X) - base(X)
    assert (first - second).norm() > 1e-3
    layer.set_adapter([ONE, "other"])
    layer.set_scale("other", 0.25)
    torch.testing.assert_close(layer(X), base(X) + first + 0.25 * second, **CLOSE)
    layer.merge()
    torch.testing.assert_close(layer(X), base(X), **CLOSE)
    layer.unmerge()
    torch.testing.assert_close(layer(X), base(X) + first + 0.25 * second, **CLOSE)
    layer.delete_adapter("other")
    layer.set_adapter([ONE])
    torch.testing.assert_close(layer(X), base(X) + first, **CLOSE)


@methods
@torch.no_grad()
def test_the_weight_change_and_its_factors_are_those_of_the_output(method):
    model, base = adapted(method)
    layer = model["layer"]
    change = weight_change(layer, ONE)
    torch.testing.assert_close(X @ change.T, layer(X) - base(X), **CLOSE)
    factors = low_rank_factors(layer, ONE)
    torch.testing.assert_close(factors.up @ factors.down, change.float(), atol=1e-4, rtol=1e-4)
    if method_named(method).is_low_rank:
        assert len(factors.down) <= RANK
    S = torch.linalg.svdvals(change)
    assert factors.relative_error == 0 or len(factors.down) < len(S)
    layer.enable_adapters(False)
    torch.testing.assert_close(weight_change(layer, ONE), change, **CLOSE)
    layer.enable_adapters(True)
    layer.merge()
    torch.testing.assert_close(weight_change(layer, ONE), change, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(("rows", "columns"), [(180, 140), (140, 180)])
@pytest.mark.parametrize("rank", [3, 64, 70, 71, 140])
def test_factors_are_exact_up_to_half_of_full_rank_and_else_the_best_of_rank_64(rows, columns, rank):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, rank, dtype=torch.float64, generator=generator) for size in (rows, columns))
    change = left @ right.T
    factors, S = best_low_rank(change), torch.linalg.svdvals(change)
    kept = rank if rank <= 70 else 64
    assert factors.up.shape == (rows, kept)
    assert factors.down.shape == (kept, columns)
    left_out = (change - factors.up.double() @ factors.down.double()).norm()
    torch.testing.assert_close(left_out, S[kept:].norm(), atol=1e-4 * float(S.norm()), rtol=1e-6)
    assert factors.relative_error == pytest.approx(float(S[kept:].norm() / S.norm()) if kept < rank else 0.0, rel=1e-6)


MISFITS = [
    ("oft", {"block_size": 5}, r"OFT cannot adapt 'layer': block_size must divide its in_features of 16, got 5.*such as 2, 4, 8"),
    ("boft", {"block_size": 16}, r"BOFT cannot adapt 'layer': block_size \* 2\^.* in_features of 16, got 32"),
    ("boft", {"block_size": 5}, r"block_size must be even with 2 butterfly factors, got 5"),
    ("c3a", {"block_size": 16}, r"C3A cannot adapt 'layer': block_size must divide its out_features of 24, got 16"),
    ("gralora", {"rank": 15, "gralora_k": 5}, r"GraLoRA cannot adapt 'layer': gralora_k must divide its sizes 24 x 16, got 5"),
    ("psoft", {"rank": 17}, r"PSOFT cannot adapt 'layer': rank must be at most 16, got 17"),
    ("miss", {"rank": 17}, r"MiSS cannot adapt 'layer': rank must be at most its in_features of 16, got 17"),
    ("fourierft", {"n_frequency": 385}, r"FourierFT cannot adapt 'layer': n_frequency must be at most 384.*got 385"),
]


@pytest.mark.parametrize(("method", "changes", "message"), MISFITS)
def test_an_option_that_does_not_fit_a_layer_names_the_layer_and_a_value_that_fits(method, changes, message):
    model = nn.ModuleDict({"layer": nn.Linear(N, M)})
    adapter = AdapterOptions(method=method, **{"rank": RANK, **TINY, **changes}).create()
    with pytest.raises(ValueError, match=message):
        adapter.add(model, ["layer"], torch.Generator())
    assert type(model["layer"]) is nn.Linear


@pytest.mark.parametrize("method", [name for name in PEFT_METHODS if not method_named(name).adapts_convolutions])
def test_a_convolution_is_refused_by_name_by_methods_that_adapt_linear_layers_only(method):
    model = nn.ModuleDict({"layer": nn.Conv2d(8, 8, 3)})
    with pytest.raises(ValueError, match=r"cannot adapt 'layer': it adapts nn.Linear only, got Conv2d"):
        options(method).create().add(model, ["layer"], torch.Generator())


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("gralora", {"rank": 5, "gralora_k": 2}, "gralora_k must divide rank=5, got 2"),
        ("lokr", {"decompose_factor": 0}, "decompose_factor must be -1 or at least 1, got 0"),
        ("oft", {"block_size": 1}, "block_size must be at least 2, got 1"),
        ("boft", {"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor must be at least 1, got 0"),
        ("delora", {"delora_lambda": 0.0}, "delora_lambda must be above 0, got 0"),
        ("fourierft", {"scaling": 0.0}, "scaling must be above 0, got 0"),
        ("randlora", {"alpha": 0.0}, "alpha must be above 0, got 0"),
        ("hra", {"rank": 3}, "rank must be an even number of at least 2, got 3"),
    ],
)
def test_a_wrong_option_is_refused_before_a_model_is_loaded(method, changes, message):
    with pytest.raises(ValueError, match=message):
        AdapterOptions(method=method, **changes)


@pytest.mark.parametrize("factor", [-1, 2, 5, 8, 64])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_the_formula_of_lokr_counts_its_parameters_for_every_factor(factor, rank):
    adapter = AdapterOptions(method="lokr", rank=rank, decompose_factor=factor).create()
    for m, n in ((40, 24), (24, 7), (36, 64)):
        model = nn.ModuleDict({"layer": nn.Linear(n, m)}).requires_grad_(False)
        adapter.add(model, ["layer"], torch.Generator())
        names = vars(adapter.options) | adapter.formula_names(m, n)
        assert sum(map(torch.Tensor.numel, trained_parameters({"": model}))) == eval(adapter.parameters, {}, names)


# Widths of the inputs and outputs of attention and feed-forward layers.
SDXL = [(320, 320), (640, 640), (1280, 1280), (640, 2048), (1280, 2048), (5120, 640), (640, 2560), (10240, 1280), (1280, 5120)]
TEXT_ENCODERS = [(768, 768), (1280, 1280), (3072, 768), (768, 3072)]
CLIP = [(512, 512), (768, 768), (1024, 1024), (1152, 1152), (1280, 1280), (1408, 1408), (1664, 1664)]


@methods
@pytest.mark.parametrize(("task", "sizes"), [("subject", SDXL + TEXT_ENCODERS), ("few-shot", CLIP)])
def test_default_options_fit_all_widths_of_sdxl_and_clip(method, task, sizes):
    kind = method_named(method)
    adapter = kind(kind.Options(**kind.defaults(task, False).options))
    assert [adapter.misfit_of_size(m, n) for m, n in sizes] == [None] * len(sizes)


def test_the_scaling_is_1_unless_alpha_is_given():
    for method in PEFT_METHODS:
        config = AdapterOptions(method=method, rank=RANK, **TINY).create().config(["layer"])
        if hasattr(config, "alpha"):
            assert config.alpha == RANK


@pytest.mark.parametrize("signs", [[1, -1, 1, -1], [-1, -1, -1, -1]])
@torch.no_grad()
def test_psoft_restores_the_signs_of_singular_vectors_of_another_machine(signs, tmp_path, monkeypatch):
    model, base = adapted("psoft")
    model.float()
    expected = model["layer"](X.float())
    adapter_files.save({"": model}, tmp_path)
    svd, flip = torch.linalg.svd, torch.tensor([*signs, *[1] * (N - RANK)], dtype=torch.float32)

    def flipped(weight, full_matrices):
        U, S, Vh = svd(weight, full_matrices=full_matrices)
        return (U * flip, S, flip[:, None] * Vh) if weight.shape == (M, N) else (U, S, Vh)

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    fresh = nn.ModuleDict({"layer": nn.Linear(N, M)}).requires_grad_(False)
    fresh["layer"].load_state_dict(base.float().state_dict())
    adapter_files.load({"": fresh}, tmp_path / "full")
    torch.testing.assert_close(fresh["layer"](X.float()), expected, **CLOSE)


def test_the_seed_chooses_the_frequencies_of_fourierft_and_the_matrices_of_randlora():
    for method, drawn in (("fourierft", lambda layer: layer.indices[ONE]), ("randlora", lambda layer: layer.randlora_A[ONE])):
        first, again, other = (drawn(adapted(method, seed)[0]["layer"]) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_boft_trains_as_many_butterfly_factors_as_its_option_says():
    model, _ = adapted("boft")
    assert model["layer"].boft_R[ONE].shape == (2, N // TINY["block_size"], TINY["block_size"], TINY["block_size"])


@pytest.mark.parametrize(
    ("method", "convolution", "message"),
    [
        *(
            (name, {"padding": 1, "padding_mode": "reflect"}, "pad with zeros, got padding_mode='reflect'")
            for name in ("hra", "loha")
        ),
        ("hra", {"groups": 2}, r"without groups, got kernel_size=\(3, 3\) and groups=2"),
        ("hra", {"kernel_size": (1, 3)}, r"square kernels .*, got kernel_size=\(1, 3\)"),
    ],
)
def test_a_convolution_whose_output_pefts_layer_would_change_is_refused(method, convolution, message):
    model = nn.ModuleDict({"layer": nn.Conv2d(8, 8, **{"kernel_size": 3, **convolution})})
    with pytest.raises(ValueError, match=rf"cannot adapt 'layer': it adapts convolutions .*{message}"):
        options(method).create().add(model, ["layer"], torch.Generator())


def test_a_deleted_adapter_leaves_no_scale_to_a_later_one_of_its_name():
    model, _ = adapted("loha")
    model["layer"].set_scale(ONE, 0.5)
    model["layer"].delete_adapter(ONE)
    options("loha").create().add(model.float(), ["layer"], torch.Generator().manual_seed(0))
    disturb(model, 0)
    fresh, _ = adapted("loha")
    torch.testing.assert_close(model["layer"](X.float()), fresh["layer"](X).float())


def saved(method, folder, metadata):
    """A file of an adapter of `method`, with `metadata` in place of what it says."""
    model, _ = adapted(method)
    method_named(method).save({"unet": model.float()}, folder, ONE)
    part = folder / "full" / "unet"
    files = read_native(part)
    write_native(part, files.config, files.tensors, metadata(files.metadata))
    return folder / "full"


@pytest.mark.parametrize("method", ["fourierft", "randlora"])
@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (lambda saved: {key: saved[key] for key in saved if not key.endswith("_sha256")}, "Load it with PEFT, or train it again"),
        (lambda saved: {key: "0" if key in (INDICES, BASES) else saved[key] for key in saved}, "gives other"),
    ],
)
def test_a_file_whose_seed_may_give_other_values_is_refused(method, metadata, message, tmp_path):
    model = nn.ModuleDict({"layer": nn.Linear(N, M)})
    with pytest.raises(ValueError, match=message):
        adapter_files.load({"unet": model}, saved(method, tmp_path, metadata), "loaded")


def test_a_file_of_fourierft_that_earlier_versions_wrote_without_places_loads(tmp_path):
    model = nn.ModuleDict({"layer": nn.Linear(N, M)})
    folder = saved("fourierft", tmp_path, lambda saved: {key: saved[key] for key in saved if "places" not in key})
    adapter_files.load({"unet": model}, folder, "loaded")
    assert len(model["layer"].fourierft_spectrum["loaded"]) == TINY["n_frequency"]
