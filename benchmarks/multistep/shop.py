"""The shop: customers, their orders and payment methods, behind the tools of a customer service."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.agent_policy import Call
from benchmarks.multistep import names
from benchmarks.multistep.task import Case, Domain, Family, Source, Step, once, question, seen, slot, until
from benchmarks.multistep.view import View
from benchmarks.multistep.world import VERIFY, Change, Refused, Tool, World

BY_NAME = Tool("find_user_id_by_name_zip", "Find a customer by name and zip code.", ("first_name", "last_name", "zip"))
BY_EMAIL = Tool("find_user_id_by_email", "Find a customer by e-mail address.", ("email",))
USER = Tool("get_user_details", "Show a customer's address, payment methods and orders.", ("user_id",))
ORDER = Tool("get_order_details", "Show an order's status, items and parcel.", ("order_id",))
TRACKING = Tool("get_tracking", "Show where a parcel is.", ("tracking_id",))
GIFT_CARD = Tool("get_gift_card", "Show what is left on a gift card.", ("card_id",))
PRODUCTS = Tool("list_product_types", "List all types of product.")
PRODUCT = Tool("get_product_details", "Show the variants of a type of product.", ("product",))
HELP = Tool("search_help", "Search the help pages.", ("topic",))
HOURS = Tool("get_store_hours", "Show when the shop is open.", ("city",))
CANCEL = Tool("cancel_order", "Cancel a pending order.", ("order_id", "reason"), writes=True, free="reason")
RETURN = Tool("return_item", "Take back a delivered item.", ("order_id", "item_id", "payment_id"), writes=True)
ADDRESS = Tool("change_address", "Change where a pending order goes.", ("order_id", "address"), writes=True)
IDENTITY = Tool(VERIFY, "Verify the user's identity for this session.")
PRODUCT_TYPES = {item: item for item in names.ITEMS}
TOPICS = ("returns", "refunds", "shipping", "payments", "accounts", "gift cards", "warranty", "discounts")

SHOP = Domain(
    "shop",
    "You are the customer service of a shop. Find out who the user is before anything else. Before you change anything "
    "say what you are about to do and ask the user to confirm.",
    (BY_NAME, BY_EMAIL, USER, ORDER, TRACKING, GIFT_CARD, PRODUCTS, PRODUCT, HELP, HOURS, CANCEL, RETURN, ADDRESS,
     IDENTITY),
    (
        Call(BY_EMAIL.name, {"email": "{first}@example.com"}),
        Call(BY_EMAIL.name, {"email": "{first}.{last}@example.com"}),
        Call(BY_NAME.name, {"first_name": "{first}", "last_name": "{last}", "zip": "unknown"}),
        Call(USER.name, {"user_id": "{first}_{last}"}),
        Call(USER.name, {"user_id": "{last}"}),
        Call(ORDER.name, {"order_id": "{last}"}),
        Call(ORDER.name, {"order_id": "latest"}),
        Call(TRACKING.name, {"tracking_id": "{last}"}),
        Call(GIFT_CARD.name, {"card_id": "{last}"}),
        Call(PRODUCT.name, {"product": "{last}"}),
        Call(PRODUCTS.name, {}),
        *(Call(HELP.name, {"topic": topic}) for topic in TOPICS[:4]),
        *(Call(HOURS.name, {"city": city}) for city in names.CITIES[:2]),
        *(Call(PRODUCT.name, {"product": item}) for item in names.ITEMS[:2]),
    ),
)  # fmt: skip


class Shop:
    """Three customers with orders; the first of them is the user."""

    def __init__(self, chance: random.Random, status: str) -> None:
        items = names.distinct(chance, names.ITEMS, 18)
        self.users: dict[str, dict[str, Any]] = {}
        self.orders: dict[str, dict[str, Any]] = {}
        self.parcels: dict[str, dict[str, str]] = {}
        self.cards: dict[str, str] = {}
        for _ in range(3):
            self._customer(chance, items, status)
        self.user_id = next(iter(self.users))
        self.user = self.users[self.user_id]
        self.order = self.orders[chance.choice(self.user["orders"])]
        self.item = chance.choice(self.order["items"])
        self.gone = f"#W{names.digits(chance, 7)}"

    def _customer(self, chance: random.Random, items: list[str], status: str) -> None:
        first, last = names.person(chance)
        user_id = f"{first}_{last}_{names.digits(chance, 4)}".lower()
        card = f"gift_{names.digits(chance, 7)}"
        self.cards[card] = f"{chance.randrange(5, 200)}.{names.digits(chance, 2)}"
        orders: list[str] = []
        self.users[user_id] = {
            "user_id": user_id, "first_name": first, "last_name": last, "zip": names.digits(chance, 5),
            "email": f"{first}.{last}{names.digits(chance, 3)}@example.com".lower(),
            "card_id": card, "payment_id": f"credit_{names.digits(chance, 7)}", "orders": orders,
        }  # fmt: skip
        for _ in range(3):
            order_id, tracking = f"#W{names.digits(chance, 7)}", names.digits(chance, 12)
            lines = [{"item_id": names.digits(chance, 10), "name": items.pop()} for _ in range(2)]
            self.orders[order_id] = {
                "order_id": order_id, "user_id": user_id, "status": status, "items": lines, "tracking_id": tracking,
            }  # fmt: skip
            city = chance.choice(names.CITIES)
            self.parcels[tracking] = {
                "tracking_id": tracking,
                "city": city,
                "arrives": f"2026-0{chance.randrange(3, 9)}",
            }
            orders.append(order_id)

    def world(self, change: Change, reply: str) -> World:
        """Return the tools on these data, which no call changes; the writes are recorded."""
        users = self.users
        if change.kind == "id_gone":
            users = {key: {**user, "orders": [self.gone, *user["orders"]]} for key, user in users.items()}

        def by_name(first_name: str, last_name: str, zip: str) -> dict[str, str]:  # noqa: A002 - the field's name
            return _found(users, first_name=first_name, last_name=last_name, zip=zip)

        def returned(order_id: str, item_id: str, payment_id: str) -> str:
            order = _known(self.orders, order_id, "order")
            owner = self.users[order["user_id"]]
            if order["status"] != "delivered":
                raise Refused("only a delivered item can be returned")
            if item_id not in [i["item_id"] for i in order["items"]]:
                raise Refused("item not found")
            if payment_id not in (owner["payment_id"], owner["card_id"]):
                raise Refused("payment method not found")
            return f"Return of {item_id} requested."

        return World(SHOP.tools, {
            BY_NAME.name: by_name,
            BY_EMAIL.name: lambda email: _found(users, email=email),
            USER.name: lambda user_id: _known(users, user_id, "user"),
            ORDER.name: lambda order_id: _known(self.orders, order_id, "order"),
            TRACKING.name: lambda tracking_id: _known(self.parcels, tracking_id, "parcel"),
            GIFT_CARD.name: lambda card_id: {"card_id": card_id, "balance": _known(self.cards, card_id, "gift card")},
            PRODUCTS.name: lambda: {"types": sorted(names.ITEMS)},
            PRODUCT.name: lambda product: {"product": _known(PRODUCT_TYPES, product, "product")},
            HELP.name: lambda topic: {"topic": topic, "page": f"All about {topic}."},
            HOURS.name: lambda city: {"city": city, "open": "9 to 18"},
            CANCEL.name: lambda order_id, reason: self._pending(order_id, f"Order cancelled: {reason}."),
            ADDRESS.name: lambda order_id, address: self._pending(order_id, f"Address is now {address}."),
            RETURN.name: returned,
            VERIFY: lambda: "Identity verified.",
        }, reply=reply, error=lambda text: f"Error: {text}", change=change, gone=self.gone)  # fmt: skip

    def _pending(self, order_id: str, done: str) -> str:
        if _known(self.orders, order_id, "order")["status"] != "pending":
            raise Refused("only a pending order can be changed")
        return done


def _found(users: Mapping[str, Mapping[str, Any]], **wanted: str) -> dict[str, str]:
    for user_id, user in users.items():
        if all(user[key] == value for key, value in wanted.items()):
            return {"user_id": user_id}
    raise Refused("user not found")


def _known(table: Mapping[str, Any], key: str, what: str) -> Any:
    if key not in table:
        raise Refused(f"{what} not found")
    return table[key]


# -- what the agent knows --------------------------------------------------------------------------


def _order(view: View) -> dict[str, Any] | None:
    wanted = view.slots.get("item")
    orders = [o for o in view.results(ORDER.name) if isinstance(o, dict)]
    return next((o for o in orders if wanted in [i["name"] for i in o["items"]]), None)


def _of_order(key: str) -> Source:
    return lambda view: order[key] if (order := _order(view)) else None


def _item_id(view: View) -> str | None:
    order = _order(view) or {"items": []}
    return next((i["item_id"] for i in order["items"] if i["name"] == view.slots["item"]), None)


def _orders(view: View) -> list[str]:
    return [order for user in view.results(USER.name) for order in user["orders"]]


def _refund_to(view: View) -> str | None:
    reply = next((str(m.shown) for m in view.made if not m.tool), "")
    return seen(USER.name, "card_id" if "gift" in reply else "payment_id")(view)


_user = {
    "name": once(BY_NAME, first_name=slot("first"), last_name=slot("last"), zip=slot("zip")),
    "email": once(BY_EMAIL, email=slot("email")),
}
_details = {
    "name": once(USER, user_id=seen(BY_NAME.name, "user_id")),
    "email": once(USER, user_id=seen(BY_EMAIL.name, "user_id")),
}
_look = until(ORDER, "order_id", _orders, _of_order("order_id"))


def _slip(tool: Tool, **sources: Source) -> tuple[Callable[[View], Call], ...]:
    return (lambda view: Call(tool.name, {name: source(view) or "unknown" for name, source in sources.items()}),)


_cancel = once(
    CANCEL, order_id=_of_order("order_id"), reason=lambda _: "no longer needed",
    slips=_slip(RETURN, order_id=_of_order("order_id"), item_id=_item_id, payment_id=slot("none")),
)  # fmt: skip
_return = once(
    RETURN, order_id=_of_order("order_id"), item_id=_item_id, payment_id=_refund_to,
    slips=_slip(CANCEL, order_id=_of_order("order_id"), reason=lambda _: "returned"),
)  # fmt: skip
_move = once(ADDRESS, order_id=_of_order("order_id"), address=slot("address"))
_track = once(TRACKING, tracking_id=_of_order("tracking_id"))
_balance = once(GIFT_CARD, card_id=seen(USER.name, "card_id"))

_NAMED = "Hello, I am {first} {last}, zip code {zip}. "
_MAILED = "Hi, this is {first} {last}, my e-mail is {email}. "
_SHOWN_IN = seen(TRACKING.name, "city")
_LEFT_ON = seen(GIFT_CARD.name, "balance")


def _family(
    name: str, by: str, asks: str, steps: tuple[Step, ...], answer: Callable[[View], str], *, status: str = "pending"
) -> Family:
    def case(number: int) -> Case:
        chance = random.Random(f"{name}/{number}")
        shop = Shop(chance, status)
        order, item, user = shop.order, shop.item, shop.user
        address = f"{chance.randrange(1, 99)} {chance.choice(names.STREETS)}, {chance.choice(names.CITIES)}"
        slots = {
            "first": user["first_name"], "last": user["last_name"], "zip": user["zip"], "email": user["email"],
            "item": item["name"], "address": address,
        }  # fmt: skip
        gift = chance.random() < 0.5
        reply = chance.choice(names.YES)
        if name == "return_item":
            reply = "To my gift card, please." if gift else "Back to the credit card."
        payment = user["card_id"] if gift else user["payment_id"]
        wanted: dict[str, tuple[tuple[str, Mapping[str, str]], ...]] = {
            "cancel_order": ((CANCEL.name, {"order_id": order["order_id"]}),),
            "return_item": (
                (RETURN.name, {"order_id": order["order_id"], "item_id": item["item_id"], "payment_id": payment}),
            ),
            "change_address": ((ADDRESS.name, {"order_id": order["order_id"], "address": address}),),
        }
        facts = {"track_parcel": shop.parcels[order["tracking_id"]]["city"], "gift_card": shop.cards[user["card_id"]]}
        return Case(slots, reply, wanted.get(name, ()), facts.get(name, ""), lambda change: shop.world(change, reply))

    return Family(name, SHOP, asks, (_user[by], _details[by], *steps), answer, case)


FAMILIES = (
    _family(
        "cancel_order", "name", _NAMED + "Please cancel my order with the {item}.",
        (_look, question("Shall I cancel your order with the {item}?"), _cancel),
        lambda _: "Your order is cancelled.",
    ),
    _family(
        "return_item", "email", _MAILED + "I would like to return the {item}.",
        (_look, question("Shall the money for the {item} go to your gift card or to your credit card?"), _return),
        lambda _: "Your return is requested.", status="delivered",
    ),
    _family(
        "change_address", "name", _NAMED + "The {item} that I ordered has to go to {address} instead.",
        (_look, question("Shall I send the {item} to {address}?"), _move),
        lambda _: "The address is changed.",
    ),
    _family(
        "track_parcel", "email", _MAILED + "Where is the parcel with my {item}?", (_look, _track),
        lambda view: f"Your parcel is in {_SHOWN_IN(view)}.", status="shipped",
    ),
    _family(
        "gift_card", "name", _NAMED + "How much is left on my gift card?", (_balance,),
        lambda view: f"There are {_LEFT_ON(view)} left on your gift card.",
    ),
)  # fmt: skip
