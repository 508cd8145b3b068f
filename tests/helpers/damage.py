"""Mutations of the content of any file: (draw, content, another file of the kind) -> content."""


def flip(draw, content, other):
    damaged = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        # Half of them near the start, where headers are.
        end = len(damaged) if draw.random() < 0.5 else min(len(damaged), 600)
        damaged[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def cut(draw, content, other):
    return content[: draw.randrange(len(content))]


def grow(draw, content, other):
    place = draw.randrange(len(content) + 1)
    return content[:place] + draw.randbytes(draw.choice((1, 8, 1000))) + content[place:]


def remove(draw, content, other):
    start = draw.randrange(len(content))
    return content[:start] + content[start + draw.randint(1, 64) :]


def splice(draw, content, other):
    size = draw.randint(1, min(len(content), len(other)))
    here, there = draw.randrange(len(content) - size + 1), draw.randrange(len(other) - size + 1)
    return content[:here] + other[there : there + size] + content[here + size :]


def zero(draw, content, other):
    start = draw.randrange(len(content))
    size = draw.choice((8, 64, len(content)))
    return content[:start] + bytes(len(content[start : start + size])) + content[start + size :]


def zero_all(draw, content, other):
    return bytes(draw.choice((0, 1, 7, 8, 9, len(content))))


def join(draw, content, other):
    return draw.choice((content + other, other + content, content + content))


def swap(draw, content, other):
    return other


ANY = (flip, flip, cut, grow, remove, splice, zero, zero_all, join, swap)
