"""An encoder on its way from the driver to the loaders, through Ray's object store.

    driver   certify, pack     -> put        a few megabytes, once a stream
    loader   unpack, rebuild   <- get        once a process, in half a second

A loader that gets its encoder so imports neither transformers nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray

from miles.data.config import EncodeConfig
from miles.data.encoding import kept_encoders


@dataclass(frozen=True)
class CarriedEncoder:
    """The settings of an encoder, and a reference to its state."""

    config: EncodeConfig
    reference: Any
    """None: loaders load the tokenizer and certify it themselves"""
    makes_engine: bool = False
    """each loader makes its engine at once, rather than when it has repaid that"""

    @classmethod
    def put(cls, config: EncodeConfig, *, makes_engine: bool = False) -> CarriedEncoder:
        """Certify a tokenizer, unless this process has done so, and put its encoder in the store.

        Raises:
            TemplateError: as `Encoder.from_config`.
        """
        state = kept_encoders.state_of(config)
        # An array is read where it lies in the store.
        reference = None if state is None else ray.put(np.frombuffer(state, np.uint8))
        return cls(config, reference, makes_engine)

    def copied(self) -> CarriedEncoder:
        """Return the same with a state that this process has put there.

        Ray (2.60) ends a process without a word where a node dies that has an object of its own:
        so the driver, which is to tell of the loss, keeps none.
        """
        if self.reference is None:
            return self
        return replace(self, reference=ray.put(ray.get(self.reference)))

    def rebuild(self) -> None:
        """Make the encoder in this process, unless it is there."""
        if self.reference is None:
            kept_encoders.encoder_of(self.config)
        else:
            kept_encoders.rebuild(self.config, partial(_fetch, self.reference))
        if self.makes_engine:
            kept_encoders.make_engine(self.config)


def _fetch(reference: Any) -> memoryview:
    return memoryview(ray.get(reference))
