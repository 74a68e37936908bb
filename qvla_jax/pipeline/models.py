"""Models as commands name them, loaded with the options that they were told."""

from pathlib import Path
from typing import Any

from qvla_jax.checkpoints.huggingface import CONFIG_FILE, OWN_KEY, is_huggingface, read_json
from qvla_jax.errors import InputError
from qvla_jax.inference import Policy, load_policy
from qvla_jax.model_options import ModelOptions, in_words


def load_model(model: str | Path, options: ModelOptions, **more: Any) -> Policy:
    """Loads a policy with what was said of its settings.

    Args:
        model: what `load_policy` takes.
        options: settings of a public directory.
        more: further arguments of `load_policy`.

    Raises:
        InputError: there is no such policy, or options are said of one that is no public directory.
    """
    said = options.said()
    if said and not is_huggingface(Path(model)):
        raise InputError(
            f"{model}: {in_words(said)} is for public directories; this policy holds its settings"
        )
    return load_policy(model, **said, **more)


def check_crop(model: str, options: ModelOptions) -> None:
    """Asks whether images are cropped, before a public OpenVLA policy acts in the simulator.

    Its files do not tell. Fine-tunes were trained with random crops, and their public evaluation
    crops; the base model was not. Without the crop a fine-tune succeeds too seldom, and nothing
    says so.

    Raises:
        InputError: the policy decodes action tokens, and neither its files nor the options tell.
    """
    folder = Path(model)
    if options.center_crop is not None or not is_huggingface(folder):
        return
    own = read_json(folder / CONFIG_FILE).get(OWN_KEY)
    if isinstance(own, dict) and "center_crop" in own:
        return
    if any(any(folder.glob(pattern)) for pattern in _TELLING):
        return
    raise InputError(
        f"{model}: its files do not tell whether images are cropped, and success in the simulator "
        "depends on it: say --center-crop (fine-tunes that were trained with random crops, as "
        "OpenVLA's on LIBERO were) or --no-center-crop (the base model)"
    )


# Files of kinds of policy that are always evaluated with the crop: OpenVLA-OFT's and UniVLA's.
_TELLING = ("action_head--*", "action_decoder*")
