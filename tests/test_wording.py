import pytest

from ldm.wording import check_choice, did_you_mean, nearest


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("stpes", ["steps", "seed"], "steps"),
        ("num_heds", ["num_classes", "num_heads"], "num_heads"),
        ("chanels", ["channels"], "channels"),
        ("lrr", ["lr"], "lr"),
        ("cta", ["dog", "cat"], "cat"),
        ("atuo", ["auto"], "auto"),
        ("Kl_weight", ["kl_weight", "k"], "kl_weight"),
        ("autoencodr.yaml", ["diffusion.yaml", "autoencoder.yaml"], "autoencoder.yaml"),
        ("channel_mutls", ["channel_mult", "channels"], "channel_mult"),
        ("zzz", ["kl_weight"], None),
        ("name", ["runs", "task"], None),
        ("num_classes", ["num_channels"], None),
        ("model", ["loss", "mode_1_and_more"], None),
        ("a", ["b"], None),
        ("x", [], None),
    ],
)
def test_a_suggestion_is_near(name, options, expected):
    assert nearest(name, options) == expected
    assert did_you_mean(name, options, "a.") == (f"; did you mean a.{expected}?" if expected else "")


def test_a_choice_is_one_of_what_is_allowed():
    check_choice("norm", "rms", ("layer", "rms"))
    check_choice("norm", None, {None: 1})
    with pytest.raises(ValueError, match="^norm is 'rsm', must be one of layer, rms; did you mean rms\\?$"):
        check_choice("norm", "rsm", ("layer", "rms"))
    with pytest.raises(ValueError, match=r"^norm is \['rms'\], must be one of layer, rms$"):
        check_choice("norm", ["rms"], {"layer": 1, "rms": 2})
    with pytest.raises(ValueError, match="must be one of nothing"):
        check_choice("norm", "rms", ())
