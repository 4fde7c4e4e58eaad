import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.conditioning import ClassEmbedder, ClassLabel, Conditioner, Embedder

LABELS = torch.tensor([0, 2, 1, 2])


class Features(Embedder):
    """Passes a tensor of the batch on; absent is zeros."""

    def __init__(self, key: str, kind: str, shape: tuple[int, ...], drop: float = 0.0):
        super().__init__(key, kind, drop)
        self.shape = shape

    def embed(self, values, dropped):
        return (
            values if dropped is None else torch.where(dropped.view(-1, *[1] * len(self.shape)), 0.0, values)
        )

    def null_values(self, batch_size, device):
        return torch.ones(batch_size, *self.shape, device=device)


def embedders():
    return {
        "token": ClassEmbedder(3, 5, "crossattn", drop=0.3),
        "vector": ClassEmbedder(3, 5, "vector", drop=0.3),
        "label": ClassLabel(3, drop=0.3),
    }


@pytest.fixture(params=["token", "vector", "label"])
def embedder(request):
    return embedders()[request.param]


def test_shapes():
    for name, shape in (("token", (4, 1, 5)), ("vector", (4, 5)), ("label", (4,))):
        (out,) = Conditioner([embedders()[name]])({"label": LABELS}).values()
        assert out.shape == shape


def test_values_are_rows_of_the_embedding():
    embedder = ClassEmbedder(3, 5, "vector")
    out = Conditioner([embedder])({"label": LABELS})["vector"]
    assert torch.equal(out, embedder.embedding.weight[LABELS])
    assert embedder.embedding.weight.shape == (4, 5)  # the last row stands for no class
    assert [name for name, _ in embedder.named_parameters()] == ["embedding.weight"]


def test_labels_pass_through():
    assert torch.equal(Conditioner([ClassLabel(3)])({"label": LABELS})["vector"], LABELS)


def test_nothing_is_dropped_without_u(embedder):
    conditioner = Conditioner([embedder])
    kept = torch.full((1, 4), 0.999)
    assert same(conditioner({"label": LABELS}), conditioner({"label": LABELS}, kept))


def test_unconditional_is_everything_dropped(embedder):
    conditioner = Conditioner([embedder])
    dropped = torch.full((1, 4), 1e-6)
    assert same(conditioner.unconditional(4), conditioner({"label": LABELS}, dropped))
    assert not same(conditioner.unconditional(4), conditioner({"label": LABELS}))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-6, 1 - 1e-6), min_size=4, max_size=4), st.floats(0, 1))
def test_each_sample_is_dropped_by_its_own_number(u, drop):
    u = torch.tensor([u])
    conditioner = Conditioner([ClassLabel(3, drop=drop)])
    expected = torch.where(u[0] < drop, 3, LABELS)
    assert torch.equal(conditioner({"label": LABELS}, u)["vector"], expected)


def test_embedders_drop_on_their_own():
    conditioner = Conditioner(
        [ClassEmbedder(3, 5, "crossattn", drop=0.5), ClassEmbedder(3, 5, "vector", drop=0.5)]
    )
    u = torch.tensor([[0.1] * 4, [0.9] * 4])
    out, full, empty = (
        conditioner({"label": LABELS}, u),
        conditioner({"label": LABELS}),
        conditioner.unconditional(4),
    )
    assert torch.equal(out["crossattn"], empty["crossattn"])
    assert torch.equal(out["vector"], full["vector"])


def test_merging_by_kind():
    batch = {
        "a": torch.randn(2, 3, 4),
        "b": torch.randn(2, 2, 4),
        "v": torch.randn(2, 4),
        "w": torch.randn(2, 6),
        "m": torch.randn(2, 1, 8, 8),
        "n": torch.randn(2, 2, 8, 8),
    }
    conditioner = Conditioner(
        [
            Features("a", "crossattn", (3, 4)),
            Features("v", "vector", (4,)),
            Features("b", "crossattn", (2, 4)),
            Features("w", "vector", (6,)),
            Features("m", "concat", (1, 8, 8)),
            Features("n", "concat", (2, 8, 8)),
        ]
    )
    assert conditioner.keys == ["a", "v", "b", "w", "m", "n"]
    out = conditioner(batch)
    assert torch.equal(out["crossattn"], torch.cat([batch["a"], batch["b"]], 1))
    assert torch.equal(out["vector"], torch.cat([batch["v"], batch["w"]], 1))
    assert torch.equal(out["concat"], torch.cat([batch["m"], batch["n"]], 1))
    assert {k: v.shape for k, v in conditioner.unconditional(2).items()} == {
        k: v.shape for k, v in out.items()
    }


def test_merging_tokens_along_channels():
    batch = {"a": torch.randn(2, 3, 4), "b": torch.randn(2, 3, 6)}
    parts = [Features("a", "crossattn", (3, 4)), Features("b", "crossattn", (3, 6))]
    out = Conditioner(parts, crossattn_merge="channels")(batch)["crossattn"]
    assert torch.equal(out, torch.cat([batch["a"], batch["b"]], 2))
    with pytest.raises(ValueError, match=r"do not join.*a \(2, 3, 4\), b \(2, 3, 6\)"):
        Conditioner(parts)(batch)


def test_no_embedders():
    conditioner = Conditioner()
    assert conditioner({"image": 1}) == {} == conditioner.unconditional(3)
    assert not conditioner.drops
    assert Conditioner([ClassLabel(2)]).drops


def test_gradients_reach_every_row_that_was_used():
    embedder = ClassEmbedder(3, 5, drop=0.5)
    Conditioner([embedder])({"label": torch.tensor([0, 1, 1])}, torch.tensor([[0.9, 0.9, 0.1]]))[
        "crossattn"
    ].sum().backward()
    assert embedder.embedding.weight.grad.sum(1).tolist() == [5, 5, 0, 5]


def test_missing_key_is_named():
    with pytest.raises(
        ValueError, match="reads the key 'label', but the batch has only image, index; does the data"
    ):
        Conditioner([ClassLabel(3)])({"index": 1, "image": 2})
    with pytest.raises(ValueError, match="'caption'.*only image$"):
        Conditioner([Features("caption", "vector", (2,))])({"image": 2})


def test_integer_labels_do_not_join():
    conditioner = Conditioner([ClassLabel(3), Features("v", "vector", (4,))])
    with pytest.raises(ValueError, match=r"integer labels.*\(label, v\)"):
        conditioner({"label": LABELS, "v": torch.randn(4, 4)})


def test_numbers_of_another_shape():
    with pytest.raises(ValueError, match=r"1 embedders, 4 samples.*\(4,\)"):
        Conditioner([ClassLabel(3)])({"label": LABELS}, torch.rand(4))


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "auto", None])
def test_bad_counts(count):
    for make in (lambda: ClassEmbedder(count, 4), lambda: ClassLabel(count)):
        with pytest.raises(ValueError, match="positive integer"):
            make()


def test_bad_choices():
    with pytest.raises(ValueError, match="kind is 'tokens', must be one of"):
        ClassEmbedder(3, 4, kind="tokens")
    with pytest.raises(ValueError, match="is 'concat', must be one of crossattn, vector"):
        ClassEmbedder(3, 4, kind="concat")
    with pytest.raises(ValueError, match="probability"):
        ClassLabel(3, drop=1.5)
    with pytest.raises(ValueError, match="needs null_class=True"):
        ClassEmbedder(3, 4, null_class=False)
    with pytest.raises(ValueError, match="crossattn_merge"):
        Conditioner([], crossattn_merge="sum")
    with pytest.raises(ValueError, match="got Linear"):
        Conditioner([torch.nn.Linear(1, 1)])


def test_no_row_for_no_class():
    embedder = ClassEmbedder(3, 5, drop=0.0, null_class=False)
    assert embedder.embedding.weight.shape == (3, 5)
    with pytest.raises(ValueError, match="explicit `uncond`"):
        Conditioner([embedder]).unconditional(2)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
