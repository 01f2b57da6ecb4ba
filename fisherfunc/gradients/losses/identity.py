"""Which loss it is, beyond its name: two lambdas are of one name, and seldom one loss."""

from fisherfunc.gradients.losses.token_losses import TokenLoss
from fisherfunc.linalg.grams.which_loss import UNIDENTIFIED
from fisherfunc.records.code_hash import UnidentifiedError, code_hash


def loss_id(loss: TokenLoss) -> str:
    """A hash of what a loss computes: the same for the same code and what it reads, in every process.

    Losses of this package are their names and what was put into them; those of a user's own are their code (see
    code_hash.py).

    Args:
        loss: Any token loss.

    Returns:
        The hash, with the version of Python for code of the user's; or `UNIDENTIFIED` and the reason, which is no
        identity.

    Example:
        >>> from fisherfunc.gradients.losses import classification, custom, regression
        >>> loss_id(classification()) == loss_id(classification()), loss_id(classification()) == loss_id(regression())
        (True, False)
        >>> loss_id(custom(lambda output, batch: output)) == loss_id(custom(lambda output, batch: 2 * output))
        False
    """
    functions = [loss.predictions, loss.targets, loss.valid, loss.negative_log_likelihood]
    try:
        return code_hash([loss.name, loss.shift, loss.distribution, *functions])
    except UnidentifiedError as error:
        return f"{UNIDENTIFIED}: {error}"
