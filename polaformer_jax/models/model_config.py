"""The hyper-parameters of a model: one frozen dataclass for each family, normalised and checked when it is created."""

import dataclasses
import math
import operator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from polaformer_jax.config import ATTENTION_IMPLEMENTATIONS, DTYPES
from polaformer_jax.errors import UserError

STRIDES = (4, 8, 16, 32)  # of the four stages of an image model, in pixels
# Fields of an image model that do not belong to its architecture.
FREE_FIELDS = ("img_size", "num_classes", "drop_rate", "drop_path_rate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The hyper-parameters that define a model as a function of its weights. Base class of the families' configs.

    The fields are the arguments of the official constructors, under their official names. Values are normalised
    (integers, floats, strings, and tuples of these), so that configs can be compared, hashed and written as JSON.
    How a model is computed (dtype, param_dtype, attention_impl, remat) is not part of it.

    Attributes:
        family: name of the model class.

    Raises:
        UserError: lists everything that does not fit.
    """

    family: ClassVar[str]

    def __post_init__(self):
        checks = Checks(f"{self.family} cannot be built")
        values = self._normalised(checks)
        checks.raise_problems()
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _normalised(self, checks: "Checks") -> dict[str, object]:
        """The values of all fields, converted to their types; `checks` collects what is wrong with them."""
        raise NotImplementedError

    def architecture(self) -> dict[str, object]:
        """The fields that define the architecture, without classes, input size and drop rates; unused ones are None.

        Two configs of one family with equal architectures describe models whose weights can be exchanged, up to
        resizing position tables and replacing the classifier.
        """
        raise NotImplementedError

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the fields."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def to_dict(self) -> dict[str, object]:
        """The fields by name; `type(config)(**config.to_dict()) == config`, through JSON too."""
        return {name: getattr(self, name) for name in self.names()}


def differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Names of the fields in which two configs of a family differ, except for rates of dropout and stochastic depth.

    Fields that are unused, such as the softmax window of a model without softmax blocks, do not count.
    """
    size = ("img_size", "num_classes")
    mine, theirs = (
        {**config.architecture(), **{name: getattr(config, name, None) for name in size}} for config in (one, other)
    )
    return sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))


class Checks:
    """Converts arguments to their types and collects everything that is wrong with them, to be raised at once.

    Each method returns a usable value even where it records a problem, so that later checks can continue.

    Args:
        headline: the first line of the error.
    """

    def __init__(self, headline: str):
        self.problems: list[str] = []
        self._headline = headline

    def raise_problems(self) -> None:
        """Raises a UserError that lists all problems, if there are any."""
        if self.problems:
            raise UserError("\n  - ".join([f"{self._headline}:", *self.problems]))

    def integer(self, name: str, value, *, least: int = 1) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if number is None or isinstance(value, bool) or number < least:
            self.problems.append(f"{name}={value!r}: expected an integer >= {least}")
            return least
        return number

    def integers(self, name: str, value) -> tuple[int, ...]:
        """Four integers >= 1, one for each stage."""
        return tuple(self.integer(f"{name}[{i}]", item) for i, item in enumerate(self._four(name, value)))

    def number(self, name: str, value, *, least: float, below: float = math.inf) -> float:
        """A real number in [least, below)."""
        try:
            fits = not isinstance(value, bool | np.bool_ | str) and np.ndim(value) == 0 and bool(least <= value < below)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            limits = f"in [{least}, {below})" if below < math.inf else f">= {least}"
            self.problems.append(f"{name}={value!r}: expected a number {limits}")
            return least
        return float(value)

    def numbers(self, name: str, value, *, least: float) -> tuple[float, ...]:
        """Four real numbers, one for each stage, or one for all of them."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = (value,) * 4
        return tuple(self.number(f"{name}[{i}]", item, least=least) for i, item in enumerate(self._four(name, value)))

    def boolean(self, name: str, value) -> bool:
        if not isinstance(value, bool | np.bool_):
            self.problems.append(f"{name}={value!r}: expected True or False")
            return False
        return bool(value)

    def letters(self, name: str, value, allowed: str, *, suffix: bool = False) -> str:
        """One letter for each of the four stages; with `suffix`, more characters may follow, which are not checked."""
        fits = isinstance(value, str) and (len(value) >= 4 if suffix else len(value) == 4)
        if not fits or any(letter not in allowed for letter in value[:4]):
            self.problems.append(
                f"{name}={value!r}: expected one letter of {', '.join(allowed)} for each of the four stages, as in "
                "'LLSS'"
            )
            return allowed[0] * 4
        return str(value)

    def booleans(self, name: str, value) -> tuple[bool, ...]:
        """True or False for each of the four stages."""
        return tuple(self.boolean(f"{name}[{i}]", item) for i, item in enumerate(self._four(name, value)))

    def words(self, name: str, value, allowed: str, lengths: tuple[int, ...]) -> tuple[str, ...]:
        """A word for each stage, with a letter for each of its blocks; a single letter is repeated."""
        words = []
        value = value.split(",") if isinstance(value, str) else value
        for i, (item, length) in enumerate(zip(self._four(name, value), lengths, strict=True)):
            word = item * length if isinstance(item, str) and len(item) == 1 else item
            if not isinstance(word, str) or len(word) != length or set(word) - set(allowed):
                self.problems.append(
                    f"{name}[{i}]={item!r}: expected {length} letters of {', '.join(allowed)}, one for each block"
                )
                word = allowed[0] * length
            words.append(word)
        return tuple(words)

    def choice(self, name: str, value, choices: tuple[str, ...]) -> str:
        if not isinstance(value, str) or value not in choices:
            self.problems.append(f"{name}={value!r}: expected one of {', '.join(choices)}")
            return choices[0]
        return str(value)

    def image_size(self, value) -> int:
        size = self.integer("img_size", value)
        if size % STRIDES[-1]:
            below = size // STRIDES[-1] * STRIDES[-1]
            nearest = " or ".join(str(s) for s in (below, below + STRIDES[-1]) if s)
            self.problems.append(f"img_size={size}: expected a multiple of {STRIDES[-1]}, such as {nearest}")
        return size

    def alpha(self, value) -> float:
        """A number >= 0: a negative alpha would allow powers below 1, whose slope at 0 is infinite."""
        return self.number("alpha", value, least=0)

    def kernel_size(self, value) -> int:
        """An odd integer, the size of the depthwise convolution: an even kernel has no centre."""
        size = self.integer("kernel_size", value)
        if size % 2 == 0:
            self.problems.append(f"kernel_size={size}: expected an odd number, such as {size - 1} or {size + 1}")
        return size

    def heads(
        self, dims: tuple[int, ...], num_heads: tuple[int, ...], types: tuple[str, ...], *, streams: bool = True
    ) -> None:
        """Checks that heads divide the channels of each stage; with `streams` in blocks of type L into even widths."""
        for stage, (dim, heads, letters) in enumerate(zip(dims, num_heads, types, strict=True)):
            if dim % heads:
                self.problems.append(f"num_heads[{stage}]={heads} does not divide the {dim} channels of its stage")
            elif streams and "L" in letters and dim // heads % 2:
                self.problems.append(
                    f"num_heads[{stage}]={heads} makes heads of {dim // heads} channels in a stage of type L, where "
                    "each of the two streams takes half of a head: choose an even width"
                )

    def types(self, dtype, param_dtype) -> tuple[jnp.dtype, jnp.dtype]:
        return self._type("dtype", dtype), self._type("param_dtype", param_dtype)

    def _type(self, name: str, value) -> jnp.dtype:
        try:
            dtype = jnp.dtype(value)
        except TypeError:
            dtype = None
        if dtype is None or dtype.name not in DTYPES:
            # float16, for example, is not supported: the attention's normaliser overflows in it
            self.problems.append(f"{name}={value!r}: expected one of {', '.join(DTYPES)}")
            return jnp.dtype(jnp.float32)
        if dtype == jnp.float64 and not jax.config.jax_enable_x64:
            self.problems.append(f"{name}=float64 needs jax.config.update('jax_enable_x64', True)")
        return dtype

    def _four(self, name: str, value) -> tuple:
        items = tuple(value) if hasattr(value, "__iter__") and not isinstance(value, str) else ()
        if len(items) != 4:
            self.problems.append(f"{name}={value!r}: expected four values, one for each stage")
            return (1, 1, 1, 1)
        return items


def check_computation(family: str, *, dtype, param_dtype, attention_impl: str) -> tuple[jnp.dtype, jnp.dtype]:
    """The dtypes in which a model computes and stores its parameters.

    Raises:
        UserError: a dtype that is not supported or not enabled, or an unknown implementation of the attention.
    """
    checks = Checks(f"{family} cannot be built")
    types = checks.types(dtype, param_dtype)
    checks.choice("attention_impl", attention_impl, ATTENTION_IMPLEMENTATIONS)
    checks.raise_problems()
    return types


def resolve_config(kind: type[ModelConfig], config: ModelConfig | None, hyperparameters: dict) -> ModelConfig:
    """The config given to a constructor, or one built from the hyper-parameters given instead.

    Raises:
        TypeError: both were given, or `config` is not a config of the family.
        UserError: a hyper-parameter is unknown, or does not fit.
    """
    if config is None:
        if unknown := sorted(hyperparameters.keys() - set(kind.names())):
            raise UserError(
                f"{kind.family} has no argument {', '.join(unknown)}; its arguments are {', '.join(kind.names())}"
            )
        return kind(**hyperparameters)
    if not isinstance(config, kind):
        raise TypeError(
            f"config is a {type(config).__name__}, expected a {kind.__name__}; other arguments are given by name"
        )
    if hyperparameters:
        raise TypeError(
            f"a config and {', '.join(hyperparameters)}: give one of them (dataclasses.replace changes a config)"
        )
    return config
