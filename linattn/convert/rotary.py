"""Queries and keys before rotary embedding, of attention modules that hand them over after it.

The inverse of an embedding is the family's own function with the angles negated, whatever its convention: halves or
pairs, all of a head or a part of it, scaled or not. That a module's queries and keys are what this inverts, and nothing
that comes after it, is tried out on the module itself before its first call. The angles by which queries are brought
nearer, and the keys of a window turned back as they leave it, are those that the model's own rotary module makes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from linattn.convert.seam import _layer_type
from linattn.errors import ConversionError

EMBED = "apply_rotary_pos_emb"
"""How families call the function ``(q, k, cos, sin) → (q, k)`` that embeds ``[B, H, T, D]`` in place of angles."""
PROBE_ATTRIBUTE = "_linattn_probe"
"""Set on an attention module while :func:`verify` wants its queries and keys, not its output."""
TURNS_ATTRIBUTE = "_linattn_turns"
"""Set on an attention module by :func:`verify`: whether it embeds at all; some layers of some families do not."""
ROTARY_ATTRIBUTE = "_linattn_rotary"
"""Holds the module that makes the angles of an attention module, where angles of other tokens are asked for."""
PROBE = 5
"""Tokens that a module is tried with."""

FAR_ROPE = ("far_rope=False", "far_rope=True")
SINK_DISTANCE = ("sink_distance", "sink_distance=None")
RETAINED_DISTANCE = ("retained_distance", "retained_distance=None")
SCORES = ("retained", "retained=0")
"""What a refusal names, and the remedy: options of a conversion that need to know the rotary embedding."""
VARYING = ("dynamic", "longrope")
"""Kinds of embedding whose frequencies depend on the sequence's length: two positions have no angle between them."""

Embed = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_EMBEDDINGS: dict[type[nn.Module], Embed] = {}


@dataclasses.dataclass(frozen=True)
class Rotation:
    """The rotary embedding of one call of an attention module.

    Attributes:
        embed: the family's function.
        cos, sin: ``[B | 1, T, R]``, scaled as the model scales them.
        size: entries of a head that are embedded, the first ones; None: as many as ``embed`` takes.
    """

    embed: Embed
    cos: Tensor
    sin: Tensor
    size: int | None = None
    angles: Callable[..., tuple[Tensor, Tensor]] | None = None
    """Cosines and sines ``[B, T, R]``, in the dtype of its first argument, at positions ``[B, T]``; None where nobody
    asked for them, they are not known, or nothing is embedded."""
    positions: Tensor | None = None
    """``[B | 1, T]`` positions of the call's tokens, None where they are not told."""
    turns: bool = True
    """Whether anything is embedded."""

    def undo(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``[B, T, H, D]`` and keys ``[B, T, Hkv, D]`` before the embedding; computed in float32 at least.

        With x ↦ a R(θ) x the embedding, its inverse is x ↦ a⁻¹ R(−θ) x: cosines and sines over a² = cos² + sin². It
        undoes the rounding of cosines and sines too.
        """
        return self._undo(q, k, self.cos, self.sin)

    def undo_at(self, k: Tensor, positions: Tensor) -> Tensor:
        """Keys ``[B, T, Hkv, D]`` of other tokens, at ``positions [B, T]``: the bits that :meth:`undo` gave for them.

        Raises:
            ConversionError: the angles there are not known.
        """
        if not self.turns:
            return k
        if self.angles is None:
            raise ConversionError(
                f"{FAR_ROPE[0]}: a cache holds the window's keys after rotary embedding only, and the angles to turn "
                "them back are not known; start from an empty cache."
            )
        cos, sin = (x.to(k.device) for x in self.angles(self.cos.new_empty(0), positions))
        return self._undo(k[:, :, :0], k, cos, sin)[1]

    def _undo(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        cos, sin = cos.to(wide), sin.to(wide)
        square = cos.square() + sin.square()
        return self._turn(q, k, cos / square, -sin / square)

    def back(self, q: Tensor, tokens: Tensor) -> Tensor:
        """Queries ``[B, T, H, D]`` as they would be so many ``tokens [B | 1, T]`` earlier; where 0, the same bits."""
        assert self.angles is not None
        like = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
        cos, sin = (x.to(q.device) for x in self.angles(like, tokens))
        size = torch.rsqrt(cos.square() + sin.square())
        turned = self._turn(q, q[:, :, :0], cos * size, -sin * size)[0]
        return torch.where(tokens[..., None, None] > 0, turned, q)

    def nearer(self, q: Tensor, distance: int) -> Tensor:
        """What of queries ``[B, T, H, D]`` meets keys before the embedding as if those were ``distance`` tokens away.

        Such keys lack the scale a of the embedding x ↦ a R(θ) x, and the queries have it twice. At what positions they
        were called makes no difference.
        """
        assert self.angles is not None
        wide = q.to(torch.promote_types(q.dtype, torch.float32))
        at = torch.full((1, 1), distance, device=self.cos.device)
        cos, sin = (x.to(q.device) for x in self.angles(wide.new_empty(0), at))
        size = torch.sqrt(cos.square() + sin.square())
        plain, none = self._undo(wide, wide[:, :, :0], self.cos, self.sin)
        return self._turn(plain, none, cos * size, sin * size)[0].to(q.dtype)

    def _turn(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q_first, k_first = (x.to(cos.dtype).transpose(1, 2) for x in (q, k))
        done = self.embed(q_first[..., : self.size], k_first[..., : self.size], cos, sin)
        if self.size is not None:
            rest = (x[..., self.size :] for x in (q_first, k_first))
            done = tuple(torch.cat(parts, -1) for parts in zip(done, rest, strict=True))  # type: ignore[assignment]
        q_done, k_done = (x.transpose(1, 2).to(q.dtype) for x in done)
        return q_done, k_done


class Seen(Exception):
    """Carries a module's queries and keys out of its attention function."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.query, self.key = query.transpose(1, 2), key.transpose(1, 2)


def embedding_of(module: nn.Module, asked: tuple[str, str] = FAR_ROPE) -> Embed:
    """The function by which ``module`` embeds its queries and keys. ``asked``: the option that needs it, the remedy.

    Raises:
        ConversionError: it embeds none, or in a way that is not known here.
    """
    kind = type(module)
    if kind in _EMBEDDINGS:
        return _EMBEDDINGS[kind]
    forward = inspect.unwrap(kind.forward)
    embed: Any = getattr(forward, "__globals__", {}).get(EMBED)
    named = {"hidden_states", "position_embeddings"} <= inspect.signature(forward).parameters.keys()
    takes = [] if embed is None else list(inspect.signature(embed).parameters)
    known = takes[:4] == ["q", "k", "cos", "sin"] or takes[1:3] == ["cos", "sin"]
    if EMBED not in forward.__code__.co_names or not (named and known):
        raise ConversionError(
            f"{asked[0]}: {kind.__name__} does not embed its queries and keys by {EMBED}(q, k, cos, sin) "
            "from position_embeddings: there is no rotary embedding to undo, or none of a known form. Use "
            f"{asked[1]}, which changes nothing for a layer without rotary embedding."
        )
    _EMBEDDINGS[kind] = embed if takes[1] == "k" else functools.partial(_each, embed)
    return _EMBEDDINGS[kind]


def _each(embed: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return embed(q, cos, sin), embed(k, cos, sin)


def rotary_of(model: nn.Module, path: str, asked: tuple[str, str]) -> nn.Module:
    """The module that makes the angles of the attention module at ``path``: the nearest ``rotary_emb`` above it.

    Args:
        asked: the option that needs it, the remedy.

    Raises:
        ConversionError: there is none of a known form, or its frequencies depend on the sequence's length.
    """
    parts = path.split(".")
    above = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1))
    rotary = next((module for m in above if (module := m._modules.get("rotary_emb")) is not None), None)
    module = model.get_submodule(path)
    kind = type(module).__name__
    takes = [] if rotary is None else list(inspect.signature(inspect.unwrap(type(rotary).forward)).parameters)[1:]
    if rotary is None or takes not in (["x", "position_ids"], ["x", "position_ids", "layer_type"]):
        raise ConversionError(
            f"{asked[0]}: no module above {kind} makes its angles as rotary_emb(x, position_ids) does. Use {asked[1]}."
        )
    rope_type: Any = getattr(rotary, "rope_type", None)
    if isinstance(rope_type, dict):
        rope_type = rope_type.get(_layer_type(module, getattr(module, "config", None)))
    if rope_type in VARYING:
        raise ConversionError(
            f"{asked[0]}: the angles of {kind} (rope_type={rope_type!r}) depend on the sequence's length, and no token "
            f"keeps its distance. Use {asked[1]}."
        )
    return rotary


def angles_for(layer: Any) -> tuple[str, str] | None:
    """What a layer, or its plan, needs the angles of other tokens for, and the remedy; None if for nothing."""
    if layer.sink_distance is not None:
        return SINK_DISTANCE
    return None if layer.retained_distance is None else RETAINED_DISTANCE


def _angles_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    rotary = module.__dict__.get(ROTARY_ATTRIBUTE)
    if rotary is None:
        return None
    takes = inspect.signature(inspect.unwrap(type(rotary).forward)).parameters
    options = {"layer_type": _layer_type(module, module.config)} if "layer_type" in takes else {}
    return functools.partial(rotary, **options)


def rotation_of(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    asked: tuple[str, str] = FAR_ROPE,
    *,
    with_angles: tuple[str, str] | None = None,
) -> Rotation:
    """The rotary embedding that ``module``, called with these arguments, puts its queries and keys through.

    Args:
        asked: the option that needs it, the remedy. with_angles: the same of what cannot go without the angles of other
            tokens.

    Raises:
        ConversionError: it cannot be had from the arguments, or it is not what makes the queries and keys.
    """
    pair = kwargs.get("position_embeddings")
    if pair is None:
        pair = next((x for x in args if isinstance(x, tuple)), None)
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(x, Tensor) and x.ndim == 3 for x in pair)):
        raise ConversionError(
            f"{asked[0]}: {type(module).__name__} was called without position_embeddings of cosines and sines "
            f"[B, T, R]; convert the model with {asked[1]}."
        )
    size: Any = getattr(module, "rotary_ndims", None)
    size = size if isinstance(size, int) else None
    told: Any = kwargs.get("position_ids")
    positions = told if isinstance(told, Tensor) and told.ndim == 2 else None
    rotation = Rotation(embedding_of(module, asked), *pair, size=size, angles=_angles_of(module), positions=positions)
    if TURNS_ATTRIBUTE not in module.__dict__:
        if with_angles is not None:
            verify_angles(module, rotation, with_angles)
        verify(module, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], rotation, asked)
    if module.__dict__.get(TURNS_ATTRIBUTE, True):
        return rotation
    cos, sin = torch.ones_like(rotation.cos), torch.zeros_like(rotation.sin)
    return dataclasses.replace(rotation, cos=cos, sin=sin, angles=None, turns=False)


@torch.compiler.disable
def verify_angles(module: nn.Module, rotation: Rotation, asked: tuple[str, str]) -> None:
    """Compare the angles of the module's call with those that its rotary module makes at the positions of that call.

    Raises:
        ConversionError: they differ, or the positions, one for each token, are not told.
    """
    if angles_hold(rotation) is not False:
        return
    told = rotation.positions is not None
    raise ConversionError(
        f"{asked[0]}: {type(module).__name__} was called "
        + ("with other angles than its rotary_emb makes" if told else "without position_ids [B, T] beside its angles")
        + f"; convert the model with {asked[1]}."
    )


@torch.no_grad()
def angles_hold(rotation: Rotation) -> bool | None:
    """Whether the angles of a call are those that the rotary module makes at the call's positions.

    Where nothing is embedded, and on the meta device, they are taken to be; None if they are, but all positions are 0,
    where all frequencies agree.
    """
    if rotation.positions is None:
        return False
    if not rotation.turns or rotation.cos.is_meta:
        return True
    if rotation.angles is None:
        return False
    found = rotation.angles(rotation.cos, rotation.positions)
    bound = 16 * torch.finfo(rotation.cos.dtype).eps
    pairs = zip(found, (rotation.cos, rotation.sin), strict=True)
    if not all(a.shape[1:] == b.shape[1:] and torch.allclose(a.to(b.device), b, 0, bound) for a, b in pairs):
        return False
    return True if bool(rotation.positions.any()) else None


@torch.compiler.disable
@torch.no_grad()
def verify(module: nn.Module, hidden_states: Tensor, rotation: Rotation, asked: tuple[str, str] = FAR_ROPE) -> None:
    """Try on random tokens that undoing the rotary embedding gives the queries and keys without one, once for a module.

    Raises:
        ConversionError: it does not. A norm with weights after the embedding is a reason.
    """
    if hidden_states.is_meta:
        return
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, PROBE, hidden_states.shape[-1], generator=draw).to(hidden_states)
    # The angles of a token of the call and further ones, equal for all entries of a head, which hold in any order.
    more = torch.arange(1, PROBE + 1, device=rotation.cos.device)[None, :, None]
    cos, sin = rotation.cos[:1, -1:].float(), rotation.sin[:1, -1:].float()
    cos, sin = cos * more.cos() - sin * more.sin(), sin * more.cos() + cos * more.sin()
    cos, sin = cos.to(rotation.cos.dtype), sin.to(rotation.sin.dtype)
    turned = dataclasses.replace(rotation, cos=cos, sin=sin)
    q, k = _seen(module, tokens, turned, asked)
    untouched = dataclasses.replace(rotation, cos=torch.ones_like(cos), sin=torch.zeros_like(sin))
    plain = _seen(module, tokens, untouched, asked)
    turns = not (torch.equal(q, plain[0]) and torch.equal(k, plain[1]))
    if turns:
        try:
            undone = turned.undo(q, k)
        except RuntimeError as reason:
            raise ConversionError(
                f"{asked[0]}: the rotary embedding of {type(module).__name__} cannot be undone ({reason}); convert "
                f"the model with {asked[1]}."
            ) from reason
        # Some families embed in float32 whatever the model's dtype is.
        bound = 16 * max(torch.finfo(q.dtype).eps, torch.finfo(torch.float32).eps)
        for name, found, want in zip(("queries", "keys"), undone, plain, strict=True):
            error = (found - want).abs().max() / want.abs().max().clamp_min(torch.finfo(want.dtype).tiny)
            if not error <= bound:
                raise ConversionError(
                    f"{asked[0]}: undoing the rotary embedding of {type(module).__name__} leaves a relative error "
                    f"of {error.item():.1g} in its {name}: they pass through more than that (a norm after it, say). "
                    f"Convert the model with {asked[1]}."
                )
    module.__dict__[TURNS_ATTRIBUTE] = turns


def _seen(module: nn.Module, tokens: Tensor, rotation: Rotation, asked: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Queries and keys that ``module`` makes of ``tokens`` under ``rotation``."""
    given: dict[str, Any] = {"hidden_states": tokens, "position_embeddings": (rotation.cos, rotation.sin)}
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters.values()
    if any(p.kind is p.VAR_KEYWORD or p.name == "position_ids" for p in parameters):
        given["position_ids"] = torch.arange(PROBE, device=tokens.device)[None]
    named = (p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    missing = {p.name: None for p in named if p.default is p.empty and p.name not in ("self", *given)}
    module.__dict__[PROBE_ATTRIBUTE] = True
    try:
        module.forward(**given, **missing)
    except Seen as seen:
        return seen.query, seen.key
    except Exception as error:
        raise ConversionError(
            f"{asked[0]}: {type(module).__name__} could not be tried without its rotary embedding "
            f"({type(error).__name__}: {error}); convert the model with {asked[1]}."
        ) from error
    finally:
        del module.__dict__[PROBE_ATTRIBUTE]
    raise ConversionError(
        f"{asked[0]}: {type(module).__name__} did not call its attention function; convert with {asked[1]}."
    )
