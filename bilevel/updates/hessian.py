"""The Hessian of the outer value of a bilevel problem, times a direction."""

from bilevel import autodiff, tree
from bilevel.control.tangent import HessianProduct, hvp
from bilevel.errors import UnsupportedError
from bilevel.implicit_function import implicit
from bilevel.methods.base import HypergradientMethod
from bilevel.methods.implicit import Implicit
from bilevel.methods.instance import Instance
from bilevel.methods.mlm import MLM
from bilevel.methods.unrolled import Unrolled
from bilevel.outer.watching import OnFailure
from bilevel.tree import Tree


def hessian_product(
    instance: Instance, method: HypergradientMethod, direction: Tree, on_failure: OnFailure
) -> HessianProduct:
    """What `BilevelSolver.hvp` returns.

    Args:
        instance: the problem at a control.
        method: `Implicit` for the value at the exact inner solution, `MLM` or `Unrolled` for that
            after the steps.
        direction: like the control.
        on_failure: what to do where the inner solution is none.

    Returns:
        Product, gradient and value.

    Raises:
        UnsupportedError: if the method has no second derivative.
    """
    if isinstance(method, Implicit):
        return _at_solution(instance, method, direction, on_failure)
    whole = isinstance(method, MLM) and method.last is None and method.tolerance is None
    if not (whole or isinstance(method, Unrolled)):
        raise UnsupportedError(
            f"{method} differentiates no value exactly, so that hvp has none to take: Implicit() "
            "has that of the exact inner solution, MLM() and Unrolled() that after the steps made."
        )
    checkpointing = method.checkpointing if isinstance(method, MLM) else None
    problem = instance.control_problem()
    given = instance.observation, instance.control, direction
    return hvp(problem, *given, checkpointing=checkpointing)


def _at_solution(
    instance: Instance, method: Implicit, direction: Tree, on_failure: OnFailure
) -> HessianProduct:
    # w(alpha) is a function that is differentiated by its equation, as often as one likes: twice.
    params = instance.dynamics.readout(instance.iterated.state)
    residual, solver = instance.residual, method.solver_for(instance)
    solution = implicit(lambda _: params, residual, linear=solver, on_failure=on_failure)
    control = autodiff.variables(instance.control)
    with autodiff.recording():
        value = instance.outer(solution(control), control)
        slope = autodiff.pull(value, tree.map_leaves(_one, value), control, keep=True)
        product = autodiff.pull(tree.filled(slope, control), direction, control)
    return HessianProduct(tree.filled(product, control), tree.detach(slope), value.detach())


def _one(value: Tree) -> Tree:
    return value.detach() * 0 + 1
