"""Dataclasses that are pytrees, as `flax.struct` has them: importing Flax for them would take longer than all the core.

@struct.dataclass
class Sums:
  loss: jax.Array
"""

import dataclasses
import typing
from typing import Any, TypeVar

import jax

T = TypeVar("T")


@typing.dataclass_transform(frozen_default=True)
def dataclass(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and a pytree of all its fields, with `x.replace(field=value)`."""
    made = dataclasses.dataclass(frozen=True)(cls)
    made.replace = _replace
    names = [field.name for field in dataclasses.fields(made)]
    return jax.tree_util.register_dataclass(made, data_fields=names, meta_fields=[])


def _replace(self: T, **changes: Any) -> T:
    """A copy with other values for some fields."""
    return dataclasses.replace(self, **changes)
