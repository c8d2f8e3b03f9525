"""Collections: named lists of repositories, kept in one JSON file."""

import json
import re
import uuid
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hf_merge.demo.hub.access import Gate, User
from hf_merge.demo.hub.info import is_collectible
from hf_merge.demo.hub.reading import argument, limit
from hf_merge.demo.hub.refusal import Refusal, bad_request
from hf_merge.demo.hub.store import Store, now
from hf_merge.demo.hub.writing import json_body

Collection = dict[str, Any]
_DESCRIPTION_LIMIT = 150
_NOTE_LIMIT = 500


class Gathering:
    """The handlers of collections."""

    def __init__(self, store: Store, gate: Gate) -> None:
        self.store = store
        self.gate = gate
        self.path = store.root / "collections.json"

    def routes(self) -> list[Route]:
        """The routes."""
        one = "/api/collections/{namespace}/{slug}"
        return [
            Route("/api/collections", self.list),
            Route("/api/collections", self.create, methods=["POST"]),
            Route(one, self.get),
            Route(one, self.update, methods=["PATCH"]),
            Route(one, self.delete, methods=["DELETE"]),
            Route(one + "/items", self.add_item, methods=["POST"]),
            Route(one + "/items/{item}", self.update_item, methods=["PATCH"]),
            Route(one + "/items/{item}", self.delete_item, methods=["DELETE"]),
        ]

    def _load(self) -> dict[str, Collection]:
        try:
            loaded: dict[str, Collection] = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        return loaded

    def _change(self, change: Callable[[dict[str, Collection]], Collection]) -> Collection:
        with self.store.lock("collections"):
            collections = self._load()
            changed = change(collections)
            changed["lastUpdated"] = now()
            self.store.write(self.path, json.dumps(collections).encode())
        return changed

    def _visible(self, collection: Collection, viewer: User | None) -> bool:
        return not collection["private"] or (viewer is not None and viewer.belongs_to(collection["owner"]["name"]))

    def _find(self, request: Request, collections: dict[str, Collection]) -> Collection:
        slug = f"{argument(request, 'namespace')}/{argument(request, 'slug')}"
        collection = collections.get(slug)
        if collection is None or not self._visible(collection, self.gate.viewer(request)):
            raise Refusal(404, f"Collection not found: {slug!r}")
        return collection

    async def _update(self, request: Request, change: Callable[[Collection], None]) -> Collection:
        """Change the collection of the path, if this request may."""
        self.gate.writer(request, self._find(request, self._load())["owner"]["name"])

        def apply(collections: dict[str, Collection]) -> Collection:
            collection = self._find(request, collections)
            change(collection)
            return collection

        return await run_in_threadpool(self._change, apply)

    async def list(self, request: Request) -> Response:
        """Collections of an owner or with an item, with their first four items."""
        viewer = self.gate.viewer(request)
        owners, items = request.query_params.getlist("owner"), request.query_params.getlist("item")
        answer = []
        for collection in self._load().values():
            names = {f"{item['type']}s/{item['id']}" for item in collection["items"]}
            if (owners and collection["owner"]["name"] not in owners) or (items and not names & set(items)):
                continue
            if self._visible(collection, viewer):
                shown = {key: value for key, value in collection.items() if key != "position"}
                answer.append({**shown, "items": collection["items"][:4]})
        return JSONResponse(answer[: limit(request)])

    async def get(self, request: Request) -> Response:
        """One collection."""
        return JSONResponse(self._find(request, self._load()))

    async def create(self, request: Request) -> Response:
        """A collection; 409 with the slug if the owner has one of this title."""
        data = await json_body(request)
        title = _title(data.get("title"))
        user = self.gate.user(request)
        namespace = str(data.get("namespace") or user.name)
        self.gate.writer(request, namespace)
        words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")

        def create(collections: dict[str, Collection]) -> Collection:
            for slug, other in collections.items():
                if other["owner"]["name"] == namespace and other["title"] == title:
                    raise Refusal(409, f"Collection {title!r} already exists", slug=slug)
            slug = f"{namespace}/{words}-{uuid.uuid4().hex[:24]}"
            collections[slug] = {
                "slug": slug,
                "title": title,
                "description": _limited("description", data.get("description"), _DESCRIPTION_LIMIT),
                "owner": {"type": "user" if namespace == user.name else "org", "name": namespace},
                "items": [],
                "position": len(collections),
                "private": data.get("private") is True,
                "theme": "blue",
                "upvotes": 0,
            }
            return collections[slug]

        return JSONResponse(await run_in_threadpool(self._change, create))

    async def update(self, request: Request) -> Response:
        """Change title, description, privacy, position or theme; the slug stays."""
        data = await json_body(request)

        def change(collection: Collection) -> None:
            if "title" in data:
                collection["title"] = _title(data["title"])
            if "description" in data:
                collection["description"] = _limited("description", data["description"], _DESCRIPTION_LIMIT)
            collection.update({key: data[key] for key in ("private", "position", "theme") if key in data})

        return JSONResponse({"success": True, "data": await self._update(request, change)})

    async def delete(self, request: Request) -> Response:
        """Delete a collection."""
        self.gate.writer(request, self._find(request, self._load())["owner"]["name"])

        def remove(collections: dict[str, Collection]) -> Collection:
            return collections.pop(self._find(request, collections)["slug"])

        await run_in_threadpool(self._change, remove)
        return JSONResponse({})

    async def add_item(self, request: Request) -> Response:
        """Append an item that exists; 409 if it is there already."""
        data = await json_body(request)
        item = data.get("item") or {}
        kind, name = item.get("type"), item.get("id")
        if not is_collectible(kind, name):
            raise bad_request(f"{name!r} of type {kind!r} cannot be in a collection")
        if kind in ("model", "dataset", "space"):
            self.gate.check_read(request, self.store.get(f"{kind}s", str(name)))
        note = _limited("note", data.get("note"), _NOTE_LIMIT)

        def change(collection: Collection) -> None:
            if any(other["id"] == name and other["type"] == kind for other in collection["items"]):
                raise Refusal(409, f"{name} is already in the collection")
            entry = {"_id": uuid.uuid4().hex[:24], "id": name, "type": kind}
            collection["items"].append(entry | ({"note": {"text": note, "html": note}} if note else {}))
            _number(collection)

        return JSONResponse(await self._update(request, change))

    async def update_item(self, request: Request) -> Response:
        """Change the note or the position of an item."""
        data = await json_body(request)

        def change(collection: Collection) -> None:
            item = _item(collection, argument(request, "item"))
            if "note" in data:
                note = _limited("note", data["note"], _NOTE_LIMIT)
                item["note"] = {"text": note, "html": note}
            if "position" in data:
                collection["items"].remove(item)
                collection["items"].insert(int(data["position"]), item)
                _number(collection)

        await self._update(request, change)
        return JSONResponse({})

    async def delete_item(self, request: Request) -> Response:
        """Take an item out."""

        def change(collection: Collection) -> None:
            collection["items"].remove(_item(collection, argument(request, "item")))
            _number(collection)

        await self._update(request, change)
        return JSONResponse({})


def _title(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise bad_request("A collection needs a title")
    return value


def _limited(name: str, value: object, limit: int) -> str | None:
    if value is not None and not isinstance(value, str):
        raise bad_request(f"{name} must be a string")
    if value and len(value) > limit:
        raise bad_request(f"{name} has {len(value)} characters, at most {limit} are allowed")
    return value


def _item(collection: Collection, item_id: str) -> dict[str, Any]:
    for item in collection["items"]:
        if item["_id"] == item_id:
            found: dict[str, Any] = item
            return found
    raise Refusal(404, f"No item {item_id!r} in this collection")


def _number(collection: Collection) -> None:
    for position, item in enumerate(collection["items"]):
        item["position"] = position
