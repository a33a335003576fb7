"""One contract, several backends: signatures, checked arguments, buffers that are used, overwritten or added to."""

import inspect

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu.backends.contract import Backend
from backprop_gpu.backends.selection import MODULES

N, N_IN, N_OUT, N_NEXT, SIZE = 7, 5, 3, 2, 11

ARRAYS = {
    "dense_forward": {"a_prev": (N, N_IN), "W": (N_IN, N_OUT), "b": (N_OUT,), "a": (N, N_OUT), "z": (N, N_OUT)},
    "output_forward": {"z": (N, N_OUT), "a": (N, N_OUT)},
    "output_delta": {"z": (N, N_OUT), "target": (N, N_OUT), "sample_weight": (N,), "delta": (N, N_OUT)},
    "dense_backward": {"delta_next": (N, N_NEXT), "W_next": (N_OUT, N_NEXT), "kept": (N, N_OUT), "delta": (N, N_OUT)},
    "dense_gradients": {
        "a_prev": (N, N_IN),
        "delta": (N, N_OUT),
        "W": (N_IN, N_OUT),
        "dW": (N_IN, N_OUT),
        "db": (N_OUT,),
    },
    "update": {"parameters": (SIZE,), "gradients": (SIZE,), "m": (SIZE,), "v": (SIZE,)},
}
"""The arrays of each operation, inputs first, and shapes that agree with each other."""

OTHERS = {
    "dense_forward": {"activation": "silu"},
    "output_forward": {"output_activation": "softmax"},
    "output_delta": {"loss": "squared_error"},
    "dense_backward": {"activation": "silu"},
    "dense_gradients": {"alpha": 0.5},
    "update": {"optimizer": "adam", "learning_rate": 0.1, "step": 1, "n_weights": 8},
}
"""The other arguments, such that every array above is read or written."""

OUTPUTS = {
    "dense_forward": ("a", "z"),
    "output_forward": ("a",),
    "output_delta": ("delta",),
    "dense_backward": ("delta",),
    "dense_gradients": ("dW", "db"),
}

EVERY_ARRAY = [(operation, name) for operation, arrays in ARRAYS.items() for name in arrays]


@pytest.fixture
def arrays(put):
    """arrays(operation): positive numbers on the backend for each of its arrays."""

    def arrays(operation):
        rng = np.random.default_rng(1)
        return {name: put(rng.uniform(0.5, 1.5, shape)) for name, shape in ARRAYS[operation].items()}

    return arrays


@pytest.fixture
def call(backend):
    """call(operation, arrays, **others): the operation with these arguments."""

    def call(operation, arrays, **others):
        arguments = {**OTHERS[operation], **arrays, **others}
        if operation == "update":
            arguments["state"] = {slot: arguments.pop(slot) for slot in ("m", "v") if slot in arguments}
        return getattr(backend, operation)(**arguments)

    return call


# The backends of this machine


def test_backend_works_here(backend_status):
    if not backend_status.works:
        assert backend_status.reason
        pytest.skip(str(backend_status))
    assert bp.get_backend(backend_status.name).name == backend_status.name


def test_numpy_works_on_every_machine():
    assert next(status for status in bp.backends() if status.name == "numpy").works


def test_a_backend_says_who_it_is_and_what_it_computes_in(backend):
    assert isinstance(backend, Backend)
    assert backend.name in MODULES
    assert "float32" in backend.dtypes
    assert bp.get_backend(backend.name) is backend


CONTRACT = [name for name, member in vars(Backend).items() if inspect.isfunction(member) and name != "_output"]


def test_the_contract_has_its_operations_and_a_hook_for_each():
    assert set(ARRAYS) <= set(CONTRACT)
    assert {f"_{operation}" for operation in ARRAYS} <= set(CONTRACT)


@pytest.mark.parametrize("name", CONTRACT)
def test_signatures_are_the_contracts(backend, name):
    parameters = inspect.signature(getattr(type(backend), name)).parameters.values()
    expected = inspect.signature(getattr(Backend, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in parameters] == [(p.name, p.kind, p.default) for p in expected]


# Arrays


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[::2, ::3],
        lambda x: x[::-1],
        lambda x: x.T,
        np.asfortranarray,
        lambda x: np.broadcast_to(x[:1], x.shape),
        lambda x: x.astype(">f8"),
        lambda x: x.astype(np.float16),
        lambda x: (100 * x).astype(np.int64),
        lambda x: x > 0,
        lambda x: x.tolist(),
        lambda x: np.frombuffer(b"\0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
    ],
    ids=[
        "strided",
        "reversed",
        "transposed",
        "fortran",
        "broadcast",
        "big-endian",
        "half",
        "integer",
        "bool",
        "list",
        "misaligned",
    ],
)
def test_asarray_takes_any_layout_and_dtype(backend, dtype, draw, make):
    x = make(draw(13, 17))
    array = backend.asarray(x, dtype)
    host = backend.to_numpy(array)
    assert array.dtype == dtype
    assert host.dtype == dtype
    assert host.flags.c_contiguous
    assert np.array_equal(host, np.asarray(x).astype(dtype))


def test_asarray_keeps_the_dtype_where_none_is_asked_for(backend, dtype):
    for x in (np.arange(3, dtype=dtype), np.arange(3, dtype=np.int32)):
        assert backend.asarray(x).dtype == x.dtype


def test_asarray_does_not_copy_what_fits(backend, dtype, draw):
    array = backend.asarray(draw(5, 3), dtype)
    array[...] = backend.asarray(np.ones((5, 3)), dtype)
    backend.asarray(array, dtype)[...] = backend.zeros((5, 3), dtype)
    assert not backend.to_numpy(array).any()


def test_empty_and_zeros(backend, dtype):
    for shape in ((7,), (5, 3)):
        assert backend.empty(shape, dtype).shape == backend.zeros(shape, dtype).shape == shape
        assert backend.empty(shape, dtype).dtype == backend.zeros(shape, dtype).dtype == dtype
        assert not backend.to_numpy(backend.zeros(shape, dtype)).any()


# Arguments that do not fit


@pytest.mark.parametrize(("operation", "name"), EVERY_ARRAY)
def test_a_wrong_number_of_dimensions_is_refused(put, arrays, call, operation, name):
    shape = ARRAYS[operation][name]
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call(operation, {**arrays(operation), name: put(np.ones((1, *shape)))})


@pytest.mark.parametrize(
    ("operation", "name", "shape", "blamed"),
    [
        ("dense_forward", "a_prev", (N, N_IN + 1), "a_prev .* W"),
        ("dense_forward", "a_prev", (N + 1, N_IN), "a"),
        ("dense_forward", "W", (N_IN + 1, N_OUT), "a_prev .* W"),
        ("dense_forward", "W", (N_IN, N_OUT + 1), "b"),
        ("dense_forward", "b", (N_OUT + 1,), "b"),
        ("dense_forward", "b", (1,), "b"),
        ("dense_forward", "a", (N_OUT, N), "a"),
        ("dense_forward", "z", (N_OUT, N), "z"),
        ("output_forward", "a", (N_OUT, N), "a"),
        ("output_delta", "target", (N, N_OUT + 1), "target"),
        ("output_delta", "target", (N, 1), "target"),
        ("output_delta", "target", (N,), "target"),
        ("output_delta", "sample_weight", (N + 1,), "sample_weight"),
        ("output_delta", "sample_weight", (N, 1), "sample_weight"),
        ("output_delta", "delta", (N_OUT, N), "delta"),
        ("dense_backward", "delta_next", (N, N_NEXT + 1), "delta_next .* W_next"),
        ("dense_backward", "delta_next", (N + 1, N_NEXT), "kept"),
        ("dense_backward", "W_next", (N_NEXT, N_OUT), "delta_next .* W_next"),
        ("dense_backward", "W_next", (N_OUT + 1, N_NEXT), "kept"),
        ("dense_backward", "kept", (N_OUT, N), "kept"),
        ("dense_backward", "delta", (N_OUT, N), "delta"),
        ("dense_gradients", "a_prev", (N + 1, N_IN), "a_prev and delta"),
        ("dense_gradients", "a_prev", (N, N_IN + 1), "W"),
        ("dense_gradients", "delta", (N + 1, N_OUT), "a_prev and delta"),
        ("dense_gradients", "W", (N_OUT, N_IN), "W"),
        ("dense_gradients", "dW", (N_OUT, N_IN), "dW"),
        ("dense_gradients", "db", (N_OUT + 1,), "db"),
        ("update", "parameters", (SIZE + 1,), "gradients"),
        ("update", "gradients", (1,), "gradients"),
        ("update", "m", (SIZE - 1,), "m"),
        ("update", "v", (SIZE + 1,), "v"),
    ],
)
def test_shapes_that_disagree_are_refused(put, arrays, call, operation, name, shape, blamed):
    with pytest.raises(ValueError, match=rf"\b{blamed}\b"):
        call(operation, {**arrays(operation), name: put(np.ones(shape))})


def test_a_z_that_is_only_asked_for_is_checked_too(put, arrays, call):
    with pytest.raises(ValueError, match=r"\bz\b"):
        call("dense_forward", {**arrays("dense_forward"), "z": put(np.ones((N_OUT, N)))}, activation="relu")


@pytest.mark.parametrize(("operation", "name"), EVERY_ARRAY)
def test_a_dtype_of_its_own_is_refused(backend, dtype, arrays, call, operation, name):
    other = "float64" if dtype == "float32" else "float32"
    given = arrays(operation)
    first = next(iter(given))
    # All others are compared with the first array, so where that is the odd one the second is blamed.
    blamed = name if name != first else "|".join(given)
    given[name] = backend.asarray(backend.to_numpy(given[name]), other)
    with pytest.raises(TypeError, match=rf"\b({blamed}) is "):
        call(operation, given)


def test_arrays_of_integers_are_refused(backend):
    ones = [backend.asarray(np.ones(shape), "int32") for shape in ((2, 3), (3, 4), (4,))]
    with pytest.raises(TypeError, match=r"floating-point arrays.*got int32"):
        backend.dense_forward(*ones, "tanh")
    with pytest.raises(TypeError, match=r"floating-point arrays.*got int32"):
        backend.output_forward(ones[0], "softmax")


@pytest.mark.parametrize(("settings", "blamed"), [({"step": 0}, "step"), ({"n_weights": 8}, "n_weights")])
def test_an_update_before_the_first_or_with_too_many_weights_is_refused(backend, put, settings, blamed):
    parameters, gradients, m, v = (put(np.ones(7)) for _ in range(4))
    settings = {"learning_rate": 0.1, "step": 1, "n_weights": 7, **settings}
    with pytest.raises(ValueError, match=rf"\b{blamed} must be"):
        backend.update(parameters, gradients, {"m": m, "v": v}, "adam", **settings)
    assert (backend.to_numpy(parameters) == 1).all()


@pytest.mark.parametrize("label_dtype", ["int64", "float64", "uint8"])
def test_labels_must_be_int32(backend, put, call, label_dtype):
    labels = backend.asarray(np.zeros(N), label_dtype)
    with pytest.raises(TypeError, match=rf"\btarget must hold int32 labels.*got {label_dtype}"):
        call("output_delta", {"z": put(np.ones((N, N_OUT))), "target": labels}, loss="cross_entropy")


@pytest.mark.parametrize("n_labels", [N - 1, N + 1])
def test_one_label_for_each_row(backend, put, call, n_labels):
    labels = backend.asarray(np.zeros(n_labels), "int32")
    with pytest.raises(ValueError, match=r"\btarget\b"):
        call("output_delta", {"z": put(np.ones((N, N_OUT))), "target": labels}, loss="cross_entropy")


@pytest.mark.parametrize("given", [(), ("dW",), ("db",)])
def test_accumulating_needs_both_arrays(arrays, call, given):
    full = arrays("dense_gradients")
    some = {name: x for name, x in full.items() if name in ("a_prev", "delta", *given)}
    with pytest.raises(ValueError, match="dW and db"):
        call("dense_gradients", some, alpha=0.0, accumulate=True)


def test_alpha_needs_the_weights(arrays, call):
    full = arrays("dense_gradients")
    with pytest.raises(ValueError, match=r"\bW\b.*alpha"):
        call("dense_gradients", {name: full[name] for name in ("a_prev", "delta")}, alpha=0.1)


def test_a_missing_slot_is_refused(arrays, call):
    given = arrays("update")
    del given["v"]
    with pytest.raises((KeyError, ValueError), match=r"\bv\b"):
        call("update", given)


@pytest.mark.parametrize(
    ("operation", "name", "value"),
    [
        ("dense_forward", "activation", "relo"),
        ("dense_backward", "activation", "softmax"),
        ("output_delta", "loss", "mse"),
        ("output_delta", "output_activation", "softmax"),
        ("update", "optimizer", "sdg"),
        ("output_forward", "output_activation", "softmacks"),
    ],
)
def test_an_unknown_name_is_refused(arrays, call, operation, name, value):
    with pytest.raises(ValueError, match=f"{name.replace('_', '.')} .*{value}"):
        call(operation, arrays(operation), **{name: value})


# Outputs


@pytest.mark.parametrize("operation", OUTPUTS)
def test_given_buffers_are_used_overwritten_and_returned(backend, put, arrays, call, operation):
    names = OUTPUTS[operation]
    given = arrays(operation)
    inputs = {name: x for name, x in given.items() if name not in names}
    fresh = call(operation, inputs)
    buffers = {name: put(np.full(ARRAYS[operation][name], np.nan)) for name in names}
    returned = call(operation, {**inputs, **buffers})
    fresh, returned = (x if isinstance(x, tuple) else (x,) for x in (fresh, returned))
    assert [id(x) for x in returned if getattr(x, "shape", ())] == [id(buffer) for buffer in buffers.values()]
    for new, used in zip(fresh, returned, strict=True):
        assert np.array_equal(_host(backend, new), _host(backend, used))
        assert np.isfinite(_host(backend, used)).all()


def _host(backend, x):
    return backend.to_numpy(x) if hasattr(x, "shape") and x.shape else np.asarray(float(x))


@pytest.mark.parametrize("operation", OUTPUTS)
def test_allocated_outputs_have_the_dtype_and_shape(arrays, call, dtype, operation):
    given = arrays(operation)
    returned = call(operation, {name: x for name, x in given.items() if name not in OUTPUTS[operation]})
    new = [x for x in (returned if isinstance(returned, tuple) else (returned,)) if getattr(x, "shape", ())]
    assert [x.shape for x in new] == [ARRAYS[operation][name] for name in OUTPUTS[operation]]
    assert all(x.dtype == dtype for x in new)


@pytest.mark.parametrize("operation", OUTPUTS)
def test_inputs_are_left_alone(backend, arrays, call, operation):
    given = arrays(operation)
    before = {name: np.array(backend.to_numpy(x)) for name, x in given.items()}
    call(operation, given)
    for name in given.keys() - set(OUTPUTS[operation]):
        assert np.array_equal(backend.to_numpy(given[name]), before[name]), name


def test_forward_keeps_what_the_derivative_needs(put, arrays, call):
    inputs = {name: x for name, x in arrays("dense_forward").items() if name in ("a_prev", "W", "b")}
    for activation in bp.ACTIVATIONS.values():
        a, z = put(np.ones((N, N_OUT))), put(np.ones((N, N_OUT)))
        returned, kept = call("dense_forward", inputs, activation=activation, a=a, z=z)
        assert returned is a
        assert kept is (z if activation.derivative_from == "z" else a)


def test_accumulate_adds_and_the_default_overwrites(backend, arrays, call, assert_close):
    given = arrays("dense_gradients")
    before = {name: np.array(backend.to_numpy(given[name]), np.float64) for name in ("dW", "db")}
    new = call("dense_gradients", {name: given[name] for name in ("a_prev", "delta", "W")})
    added = call("dense_gradients", given, accumulate=True)
    for name, fresh, total in zip(("dW", "db"), new, added, strict=True):
        assert total is given[name]
        assert_close(total, before[name] + backend.to_numpy(fresh))
    overwritten = call("dense_gradients", given)
    for fresh, again in zip(new, overwritten, strict=True):
        assert np.array_equal(backend.to_numpy(fresh), backend.to_numpy(again))


def test_the_same_call_gives_the_same_bits(backend, arrays, call):
    for operation in OUTPUTS:
        given = arrays(operation)
        inputs = {name: x for name, x in given.items() if name not in OUTPUTS[operation]}
        first, second = (call(operation, inputs) for _ in range(2))
        for x, y in zip(*(r if isinstance(r, tuple) else (r,) for r in (first, second)), strict=True):
            assert np.array_equal(_host(backend, x), _host(backend, y))
