"""Which model teaches, and whether it can."""

from decoct.engine.data import load_tokenizer
from decoct.methods.training import TrainingMethod
from decoct.model import Model, open_model


def teacher_of(method: TrainingMethod, original: Model) -> Model:
    """The model that is imitated: the one that the settings name, else the one that the recipe begins with.

    Raises:
        ValueError: there is no such model, it is compressed itself and was not named, or reads other tokens.
    """
    if method.teacher is None:
        if original.described:
            raise ValueError(
                f"{original.source.label} is compressed already, so it cannot teach itself; name the model that it was "
                "made from: --set teacher=BASE"
            )
        return original
    teacher = open_model(method.teacher)
    mine, theirs = (model.shape(model.end_slots[-1].name)[0] for model in (original, teacher))
    if mine != theirs or load_tokenizer(original).get_vocab() != load_tokenizer(teacher).get_vocab():
        raise ValueError(
            f"{teacher.source.label} has another tokenizer than {original.source.label}, so their predictions cannot "
            "be compared; take a teacher of the same family"
        )
    return teacher
