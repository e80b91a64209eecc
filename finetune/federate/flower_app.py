"""The two halves of the app that `flower.write_app` names; only Flower imports this."""

from __future__ import annotations

from .flower_wire import Nodes, client_app, server_app
from .rounds import Member


def serve(plan: str, nodes: Nodes) -> None:
    """The server's half, imported late: a site does not need it."""
    from .coordinator import serve as hold

    hold(plan, nodes)


def read_site(path: str, plan: str) -> Member:
    """A site's half."""
    from .member import read_site as read

    return read(path, plan)


server = server_app(serve)  # plain assignments: Flower looks for the names without importing
client = client_app(read_site)
