import jax
import jax.numpy as jnp
import jaxopt

from docs.peers import ridge

jax.config.update("jax_enable_x64", val=True)
x, y, new_x, new_y = (
    jnp.array(part) for part in (ridge.X, ridge.Y, ridge.NEW_X, ridge.NEW_Y)
)


def inner(w, decay):
    return ((x @ w - y) ** 2).mean() + (jnp.exp(decay) * w**2).sum()


def outer(decay):
    solver = jaxopt.GradientDescent(
        inner, stepsize=0.1, maxiter=100, acceleration=False, implicit_diff=True
    )
    w = solver.run(jnp.zeros(3), decay=decay).params
    return ((new_x @ w - new_y) ** 2).mean()


print(jax.grad(outer)(jnp.full(3, -1.0)))
