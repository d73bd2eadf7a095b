"""What a user may say of quantization, and what it means."""

import keras
import pytest

from tfcompress.ops.schemes import Scheme, activation_scheme, scheme_pair, weight_scheme


def test_shorthands():
    assert weight_scheme("int4") == Scheme(4, True, "channel")
    assert activation_scheme("int8") == Scheme(8, False, "tensor")
    assert activation_scheme("dynamic") == Scheme(8, False, "channel", dynamic=True)
    assert weight_scheme(None) is None
    assert weight_scheme(Scheme(6).get_config()) == Scheme(6)


def test_one_name_for_both():
    assert scheme_pair("w4a8", "int8") == (weight_scheme("int4"), activation_scheme("int8"))
    assert scheme_pair("w3a4", "int4") == (weight_scheme("int3"), activation_scheme("int4"))
    assert scheme_pair("w4", "int8") == (weight_scheme("int4"), None)
    assert scheme_pair({"*head*": "int8", "*": "int4"}, None) == (
        {"*head*": Scheme(8), "*": Scheme(4)},
        None,
    )


def test_limits():
    assert Scheme(2).limits == (-1, 1)
    assert Scheme(2, symmetric=False).limits == (-2, 1)


def test_a_scheme_is_saved_by_keras():
    scheme = Scheme(4, granularity="group", group_size=32)
    config = keras.saving.serialize_keras_object(scheme)
    assert config["registered_name"] == "tfcompress>Scheme"
    assert keras.saving.deserialize_keras_object(config) == scheme


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Scheme(bits=9), "bits=9; pass an integer from 2 to 8"),
        (lambda: Scheme(granularity="row"), "granularity='row'; pass one of"),
        (lambda: Scheme(granularity="group"), "pass both"),
        (lambda: Scheme(group_size=32), "pass both"),
        (lambda: Scheme(granularity="group", group_size=0), "group_size=0; pass 1 or more"),
        (lambda: weight_scheme("int9"), "weights='int9' is not a .*pass \"int8\""),
        (lambda: weight_scheme(8), "weights=8 is not a quantization scheme"),
        (lambda: weight_scheme(Scheme(dynamic=True)), "is dynamic"),
        (lambda: activation_scheme(Scheme()), "must have one scale a tensor"),
        (lambda: scheme_pair("w4a8", "int4"), "says the activations too"),
        (lambda: scheme_pair("w9a8", "int8"), "weights='w9a8' is not"),
    ],
)
def test_bad_schemes_say_what_to_pass(make, text):
    with pytest.raises(ValueError, match=text):
        make()
