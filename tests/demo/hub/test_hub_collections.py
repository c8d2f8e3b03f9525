"""Collections over the real client."""

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from hf_merge.demo.hub.server import LocalHub


@pytest.fixture
def slug(api: HfApi, hub: LocalHub) -> str:
    for name in ("a", "b", "c"):
        hub.seed(f"demo/{name}", {"x.txt": b"x"})
    return str(api.create_collection("My front", description="Points", namespace="demo").slug)


def test_the_same_title_gives_the_same_collection(api: HfApi, slug: str) -> None:
    assert api.create_collection("My front", exists_ok=True).slug == slug
    with pytest.raises(HfHubHTTPError) as error:
        api.create_collection("My front")
    assert error.value.response.status_code == 409


def test_items_keep_their_order_notes_and_identity(api: HfApi, slug: str) -> None:
    for name in ("a", "b", "c"):
        api.add_collection_item(slug, f"demo/{name}", "model", note=f"point {name}")
    collection = api.add_collection_item(slug, "demo/a", "model", exists_ok=True)
    assert [(item.item_id, item.note) for item in collection.items] == [
        ("demo/a", "point a"),
        ("demo/b", "point b"),
        ("demo/c", "point c"),
    ]
    api.update_collection_item(slug, collection.items[2].item_object_id, position=0, note="first")
    api.delete_collection_item(slug, collection.items[0].item_object_id)
    items = api.get_collection(slug).items
    assert [(item.item_id, item.note, item.position) for item in items] == [
        ("demo/c", "first", 0),
        ("demo/b", "point b", 1),
    ]


def test_limits_and_absent_items_are_refused(api: HfApi, slug: str) -> None:
    with pytest.raises(HfHubHTTPError, match="at most 500"):
        api.add_collection_item(slug, "demo/a", "model", note="x" * 501)
    with pytest.raises(HfHubHTTPError, match="at most 150"):
        api.update_collection_metadata(slug, description="x" * 151)
    with pytest.raises(HfHubHTTPError) as error:
        api.add_collection_item(slug, "demo/absent", "model")
    assert error.value.response.status_code == 404


def test_lists_find_collections_by_owner_and_item(api: HfApi, slug: str) -> None:
    api.add_collection_item(slug, "demo/a", "model")
    (listed,) = api.list_collections(owner="demo")
    assert (listed.slug, [item.item_id for item in listed.items]) == (slug, ["demo/a"])
    assert [found.slug for found in api.list_collections(item="models/demo/a")] == [slug]
    assert list(api.list_collections(owner="guest")) == []


def test_only_the_owner_changes_and_sees_a_private_collection(api: HfApi, guest: HfApi, slug: str) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        guest.add_collection_item(slug, "demo/a", "model")
    assert error.value.response.status_code == 403
    assert api.update_collection_metadata(slug, private=True, title="Hidden").title == "Hidden"
    with pytest.raises(HfHubHTTPError) as error:
        guest.get_collection(slug)
    assert error.value.response.status_code == 404
    api.delete_collection(slug)
    with pytest.raises(HfHubHTTPError):
        api.get_collection(slug)
