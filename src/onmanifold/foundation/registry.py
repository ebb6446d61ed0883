"""Components and their registries: a component is a frozen dataclass, its YAML is its constructor."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import core_schema

from onmanifold.foundation.errors import ConfigError, DataError, OnManifoldError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Context:
    """What a specification may refer to without saying it in full.

    Attributes:
        named: For each kind, objects that a specification may name: ``{"threat": {"image": ball}}``.
        defaults: Values for fields that a specification leaves out: ``{"manifold": fonts}``.
    """

    named: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, object] = dataclasses.field(default_factory=dict)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: the valid names, the most similar one first."""
    valid = sorted(valid)
    similar = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f" Did you mean {similar[0]!r}?" if similar else ""
    return f"{hint} Valid: {', '.join(valid) or 'none'}."


class Registry(Generic[T]):
    """The components of one kind by their short names.

    Args:
        kind: What its components are called in messages.
        homes: Modules whose import registers them, imported when the registry is first looked into.

    >>> shapes = Registry[object]("shape")
    >>> @shapes.register("disc")
    ... @dataclasses.dataclass(frozen=True)
    ... class Disc(Component):
    ...     radius: float
    >>> shapes.build({"type": "disc", "radius": 2})
    Disc(radius=2.0)
    """

    def __init__(self, kind: str, *homes: str) -> None:
        self.kind = kind
        self._homes = homes
        self._entries: dict[str, Callable[..., T]] = {}

    @property
    def entries(self) -> dict[str, Callable[..., T]]:
        """All components by name; the modules that register them are imported at the first look."""
        homes, self._homes = self._homes, ()
        for home in homes:
            importlib.import_module(home)
        return self._entries

    def register(self, name: str) -> Callable[[C], C]:
        """Decorator that enters a component class, or a function that makes one, under ``name``."""

        def enter(target: C) -> C:
            known = self._entries.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (
                target.__module__,
                target.__qualname__,
            ):
                raise ConfigError(f"{self.kind} {name!r} is registered twice.")
            self._entries[name] = target
            if isinstance(target, type) and issubclass(target, Component):
                target.registered_name = name
            return target

        return enter

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self.entries)

    def get(self, name: str) -> Callable[..., T]:
        """The class or function registered under ``name``.

        Raises:
            ConfigError: No such name; the message shows the nearest valid one.
        """
        if name not in self.entries:
            raise ConfigError(f"Unknown {self.kind} {name!r}.{nearest(name, self.entries)}")
        return self.entries[name]

    def build(self, spec: object, context: Context | None = None) -> T:
        """Make a component from its specification.

        Args:
            spec: A name, a mapping ``{"type": name, field: value, ...}``, or a ready object.
            context: What the specification may refer to.

        Raises:
            ConfigError: Unknown name or key, missing field, wrong type, or data that specifies nothing.
        """
        context = context or Context()
        if isinstance(spec, str):
            named = context.named.get(self.kind, {})
            if spec in named:
                return named[spec]  # type: ignore[return-value]
            if spec not in self.entries:
                raise ConfigError(
                    f"Unknown {self.kind} {spec!r}.{nearest(spec, [*self.entries, *named])}"
                )
            spec = {"type": spec}
        if spec is None or isinstance(spec, bool | int | float | list | tuple):
            raise ConfigError(
                f"expected the {self.kind}'s name or a mapping with the key 'type', found {spec!r}."
            )
        if not isinstance(spec, Mapping):
            return spec  # type: ignore[return-value]
        if "type" not in spec:
            raise ConfigError(
                f"A {self.kind} needs the key 'type', found only {', '.join(map(str, spec)) or 'no keys'}."
                f"{nearest('', self.entries)}"
            )
        name = spec["type"]
        values = {key: value for key, value in spec.items() if key != "type"}
        return build_component(self.get(str(name)), values, context, label=f"{self.kind} {name!r}")


def build_component(
    target: Callable[..., T], values: Mapping[str, object], context: Context, label: str
) -> T:
    """Call ``target`` with values checked by pydantic against its signature.

    Raises:
        ConfigError: Unknown key (the nearest valid one is named), missing field, or wrong type.
    """
    parameters = inspect.signature(target).parameters
    unknown = [key for key in values if key not in parameters]
    if unknown:
        raise ConfigError(
            f"{label}: unknown key {unknown[0]!r}.{nearest(str(unknown[0]), parameters)}"
        )
    filled = {key: value for key, value in context.defaults.items() if key in parameters} | dict(
        values
    )
    try:
        if dataclasses.is_dataclass(target):
            return TypeAdapter(target).validate_python(filled, context=context)  # type: ignore[return-value]
        return target(**_arguments(target).validate_python(filled, context=context))
    except ValidationError as error:
        raise ConfigError(f"{label}: {_explain(error)}") from None
    except DataError:
        # A missing or broken file is not the specification's fault.
        raise
    except OnManifoldError as error:
        raise ConfigError(f"{label}: {error}") from error


@functools.cache
def _arguments(target: Any) -> TypeAdapter[Any]:
    """What checks the annotated arguments of a call before it is made."""
    from typing import NotRequired, Required, get_type_hints

    from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

    # The hints of a class are those of its attributes, which are a dataclass's arguments too.
    plain = inspect.isclass(target) and not dataclasses.is_dataclass(target)
    try:
        hints = get_type_hints(target.__init__ if plain else target)
    except NameError:
        # A name that only type checkers know: there is nothing to check by.
        hints = {}
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        hint = hints.get(name, Any)
        hint = hint.type if isinstance(hint, dataclasses.InitVar) else hint
        needed = parameter.default is parameter.empty
        fields[name] = Required[hint] if needed else NotRequired[hint]
    arguments = TypedDict(target.__name__, fields)  # type: ignore[misc]
    arguments.__pydantic_config__ = Component.__pydantic_config__  # type: ignore[attr-defined]
    return TypeAdapter(arguments)


def _check_arguments(kind: type[Component]) -> None:
    """Let the constructor that a dataclass has been given check its arguments as those of a file are checked."""
    plain, signature = kind.__init__, inspect.signature(kind)

    @functools.wraps(plain)
    def __init__(self: Component, *args: Any, **named: Any) -> None:
        try:
            given = signature.bind(*args, **named).arguments
        except TypeError as error:
            raise TypeError(f"{kind.__name__}: {error}") from None
        try:
            values = _arguments(kind).validate_python(given)  # type: ignore[arg-type]
        except ValidationError as error:
            raise ConfigError(f"{kind.__name__}: {_explain(error)}") from None
        plain(self, **values)

    kind.__init__ = __init__  # type: ignore[assignment]


# What pydantic appends to a place where it tries the types of a union one by one.
_TRIED = re.compile(r"[a-z-]+\[.*\]|float|int|str|bool|path|none")


def _explain(error: ValidationError) -> str:
    """The first of pydantic's findings as one sentence; of a union, what each of its types would have been."""

    def place_of(details: ErrorDetails) -> str:
        parts = [str(part) for part in details["loc"]]
        while len(parts) > 1 and _TRIED.fullmatch(parts[-1]):
            parts.pop()
        return ".".join(parts)

    first, *others = error.errors()
    place = place_of(first)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ValueError):
        # One of our own sentences, which already says what was found.
        return f"{place}: {cause}" if place else str(cause)
    if first["type"].startswith("missing"):
        return f"the key {place!r} is missing."
    alternatives = [
        other["msg"].removeprefix("Input should be ")
        for other in others
        if other["loc"] != first["loc"] and place_of(other) == place
    ]
    written, kind = repr(first["input"]), type(first["input"]).__name__
    shown = f"{written} ({kind})" if len(written) < 80 else kind
    return f"{place or 'value'}: {', or '.join([first['msg'], *alternatives])}, found {shown}."


class Component:
    """Base of all components: frozen dataclasses that check their own fields when they are made.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Disc(Component):
    ...     radius: float
    >>> Disc(radius="wide")
    Traceback (most recent call last):
    ...
    onmanifold.foundation.errors.ConfigError: Disc: radius: Input should be a valid number, unable to parse
    string as a number, found 'wide' (str).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True
    )
    registry: ClassVar[Registry[Any] | None] = None
    registered_name: ClassVar[str] = ""

    if not TYPE_CHECKING:

        def __new__(cls, *args, **named):
            # At the first instance: what the decorator `dataclass` adds is not there before.
            own = vars(cls)
            if "__init__" in own and not hasattr(own["__init__"], "__wrapped__"):
                params = own.get("__dataclass_params__")
                if params is not None and params.init:
                    _check_arguments(cls)
            return super().__new__(cls)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        # A field annotated with a kind's base class, or with one component, takes any specification of it.
        registry = cls.registry

        def resolve(value: object, info: core_schema.ValidationInfo) -> object:
            built = value
            if registry is not None:
                context = info.context if isinstance(info.context, Context) else None
                try:
                    built = registry.build(value, context)
                except ConfigError as error:
                    raise ValueError(str(error)) from error
            if not isinstance(built, cls):
                raise ValueError(f"expected {cls.__name__}, found {type(built).__name__}.")
            return built

        if "registry" in cls.__dict__:
            return core_schema.with_info_plain_validator_function(resolve)

        def choose(
            value: object,
            inner: core_schema.ValidatorFunctionWrapHandler,
            info: core_schema.ValidationInfo,
        ) -> object:
            plain = isinstance(value, Mapping) and "type" not in value
            return inner(value) if plain else resolve(value, info)

        return core_schema.with_info_wrap_validator_function(choose, handler(source))


def _name_of(kind: type) -> str:
    """A component's own name: a subclass is another component, also where it is not registered."""
    registered = str(kind.__dict__.get("registered_name", ""))
    if registered or not issubclass(kind, Component) or kind.registry is None:
        return registered
    # Not the whole path: the same file may be imported as part of a package and by itself.
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__qualname__}"


def describe(value: object) -> Any:
    """A component as plain data from which it can be built again, and by which runs are keyed.

    Tensors and objects that are no components must bring a ``fingerprint``.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = _name_of(type(value))
        fields = {
            field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
        return {"type": name, **fields} if name else fields
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    fingerprint = getattr(value, "fingerprint", None)
    if fingerprint is None:
        raise ConfigError(f"{type(value).__name__} cannot be described: it has no fingerprint.")
    return {"fingerprint": str(fingerprint)}


# Where the components of each kind register themselves; named, not imported, since those rooms lie above.
THREATS: Registry[Any] = Registry("threat", "onmanifold.threats")
OBJECTIVES: Registry[Any] = Registry("objective", "onmanifold.objectives")
ATTACKS: Registry[Any] = Registry("attack", "onmanifold.attacks")
MANIFOLDS: Registry[Any] = Registry("manifold", "onmanifold.manifolds")
DATASETS: Registry[Any] = Registry("dataset", "onmanifold.data", "onmanifold.manifolds.fonts")
CLASSIFIERS: Registry[Any] = Registry("classifier", "onmanifold.classifiers")
METHODS: Registry[Any] = Registry("method", "onmanifold.training.methods")
FITS: Registry[Any] = Registry("fit", "onmanifold.training.fits")
