import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from qvla_jax import sharding
from qvla_jax.training import TrainConfig
from qvla_jax.training.optimizer import make_optimizer


def test_matrices_of_one_shape_are_updated_as_each_by_itself(tmp_path):
    config = TrainConfig(data=("",), out=tmp_path, weight_decay=0.1, clip_norm=0.5)
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (2,), "c": (3, 4), "d": (4, 3), "e": (3, 4), "f": (1, 3, 4)}

    def draw():
        tree = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
        return sharding.replicate(sharding.data_mesh(), tree)

    plain = optax.chain(
        optax.clip_by_global_norm(0.5), contrib.muon(1.0, weight_decay=0.1, consistent_rms=0.2)
    )
    params, both = draw(), (make_optimizer(config), plain)
    with jax.numpy_dtype_promotion("standard"):
        states = [rule.init(params) for rule in both]
        step = jax.jit(lambda *given: [r.update(*g) for r, g in zip(both, given, strict=True)])
        for _ in range(2):
            grads = draw()
            results = step(*((grads, state, params) for state in states))
            (found, _), (expected, _) = results
            states = [state for _, state in results]
            for name, update in expected.items():
                np.testing.assert_allclose(found[name], update, rtol=1e-4, atol=1e-5, err_msg=name)
