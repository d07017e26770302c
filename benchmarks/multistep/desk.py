"""The help desk: employees, their accounts, devices and tickets. Its tools show errors as JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.agent_policy import Call
from benchmarks.multistep import names
from benchmarks.multistep.task import Case, Domain, Family, Source, Step, once, question, seen, slot, until
from benchmarks.multistep.view import View
from benchmarks.multistep.world import VERIFY, Change, Refused, Tool, World

EMPLOYEE = Tool("find_employee", "Find an employee by badge.", ("badge",))
ACCOUNT = Tool("get_account", "Show the state of an account.", ("account_id",))
DEVICES = Tool("list_devices", "List an employee's devices.", ("employee_id",))
DEVICE = Tool("get_device", "Show a device's kind and warranty.", ("device_id",))
TICKETS = Tool("list_tickets", "List an employee's open tickets.", ("employee_id",))
TICKET = Tool("get_ticket", "Show a ticket.", ("ticket_id",))
TEAM = Tool("find_team", "Find the team that looks after an area.", ("area",))
POOL = Tool("get_license_pool", "Show the pool of a product's licences.", ("product",))
KNOWLEDGE = Tool("search_knowledge", "Search the knowledge base.", ("text",))
OUTAGES = Tool("list_outages", "List current outages.")
POLICY = Tool("get_policy", "Show a policy.", ("name",))
UNLOCK = Tool("unlock_account", "Unlock an account.", ("account_id",), writes=True)
ASSIGN = Tool("assign_license", "Give an employee a licence from a pool.", ("employee_id", "pool_id"), writes=True)
ROUTE = Tool("assign_ticket", "Hand a ticket to a team.", ("ticket_id", "team_id"), writes=True)
IDENTITY = Tool(VERIFY, "Verify the user's identity for this session.")
PRODUCTS = ("Sketchpad", "Ledger Pro", "Mapmaker", "Slidewell", "Typeset", "Querybox", "Notewise", "Drawline")
KINDS = ("laptop", "monitor", "phone", "headset", "printer", "docking station")
SUBJECTS = ("slow network", "broken screen", "missing invoice", "lost badge", "noisy fan", "wrong salary", "cold room")
AREAS = ("network", "hardware", "billing", "access", "building", "payroll")

DESK = Domain(
    "desk",
    "You are the IT help desk of a company. Every request begins with an employee's badge. Accounts are unlocked only "
    "after the employee was asked; licences and tickets need no question.",
    (EMPLOYEE, ACCOUNT, DEVICES, DEVICE, TICKETS, TICKET, TEAM, POOL, KNOWLEDGE, OUTAGES, POLICY, UNLOCK, ASSIGN,
     ROUTE, IDENTITY),
    (
        Call(EMPLOYEE.name, {"badge": "none"}),
        Call(ACCOUNT.name, {"account_id": "{badge}"}),
        Call(ACCOUNT.name, {"account_id": "{name}"}),
        Call(DEVICES.name, {"employee_id": "{badge}"}),
        Call(DEVICE.name, {"device_id": "{badge}"}),
        Call(TICKETS.name, {"employee_id": "{badge}"}),
        Call(TICKET.name, {"ticket_id": "latest"}),
        Call(TEAM.name, {"area": "{name}"}),
        Call(TEAM.name, {"area": "general"}),
        Call(POOL.name, {"product": "{name}"}),
        Call(OUTAGES.name, {}),
        *(Call(KNOWLEDGE.name, {"text": text}) for text in SUBJECTS[:4]),
        *(Call(POLICY.name, {"name": name}) for name in ("security", "purchasing", "devices")),
    ),
    allowed=(ASSIGN.name, ROUTE.name),
)  # fmt: skip


class Desk:
    """Three employees; the first of them is the user."""

    def __init__(self, chance: random.Random) -> None:
        self.employees: dict[str, dict[str, str]] = {}
        self.accounts: dict[str, dict[str, str]] = {}
        self.owned: dict[str, list[str]] = {}
        self.opened: dict[str, list[str]] = {}
        self.devices: dict[str, dict[str, str]] = {}
        self.tickets: dict[str, dict[str, str]] = {}
        for _ in range(3):
            self._employee(chance)
        self.badge = next(iter(self.employees))
        self.employee = self.employees[self.badge]
        employee_id = self.employee["employee_id"]
        self.device = self.devices[chance.choice(self.owned[employee_id])]
        self.ticket = self.tickets[chance.choice(self.opened[employee_id])]
        self.teams = {area: f"team-{names.digits(chance, 3)}" for area in AREAS}
        self.pools = {product: f"pool-{names.digits(chance, 5)}" for product in PRODUCTS}
        self.gone = names.digits(chance, 6)

    def _employee(self, chance: random.Random) -> None:
        badge, employee_id = f"B-{names.digits(chance, 5)}", f"E{names.digits(chance, 6)}"
        account = f"acc-{names.digits(chance, 8)}"
        name = " ".join(names.person(chance))
        self.employees[badge] = {"employee_id": employee_id, "name": name, "account_id": account}
        self.accounts[account] = {"account_id": account, "state": "locked"}
        self.owned[employee_id], self.opened[employee_id] = [], []
        for kind in names.distinct(chance, KINDS, 3):
            device = f"dev-{names.digits(chance, 6)}"
            until_ = f"20{chance.randrange(27, 32)}-0{chance.randrange(1, 9)}-{chance.randrange(10, 28)}"
            self.devices[device] = {"device_id": device, "kind": kind, "warranty_until": until_}
            self.owned[employee_id].append(device)
        for subject in names.distinct(chance, SUBJECTS, 3):
            ticket = f"T-{names.digits(chance, 6)}"
            self.tickets[ticket] = {"ticket_id": ticket, "subject": subject, "area": chance.choice(AREAS)}
            self.opened[employee_id].append(ticket)

    def world(self, change: Change, reply: str) -> World:
        """Return the tools on these data, which no call changes; the writes are recorded."""
        gone = [self.gone] if change.kind == "id_gone" else []
        ids = {employee["employee_id"] for employee in self.employees.values()}

        def listed(table: Mapping[str, list[str]], employee_id: str, key: str) -> dict[str, list[str]]:
            return {key: [*gone, *_known(table, employee_id, "employee")]}

        def assigned(employee_id: str, pool_id: str) -> dict[str, str]:
            if employee_id not in ids or pool_id not in self.pools.values():
                raise Refused("employee or pool not found")
            return {"status": "assigned"}

        def routed(ticket_id: str, team_id: str) -> dict[str, str]:
            _known(self.tickets, ticket_id, "ticket")
            if team_id not in self.teams.values():
                raise Refused("team not found")
            return {"status": "routed"}

        def unlocked(account_id: str) -> dict[str, str]:
            _known(self.accounts, account_id, "account")
            return {"status": "unlocked"}

        return World(DESK.tools, {
            EMPLOYEE.name: lambda badge: _known(self.employees, badge, "employee"),
            ACCOUNT.name: lambda account_id: _known(self.accounts, account_id, "account"),
            DEVICES.name: lambda employee_id: listed(self.owned, employee_id, "devices"),
            DEVICE.name: lambda device_id: _known(self.devices, device_id, "device"),
            TICKETS.name: lambda employee_id: listed(self.opened, employee_id, "tickets"),
            TICKET.name: lambda ticket_id: _known(self.tickets, ticket_id, "ticket"),
            TEAM.name: lambda area: {"area": area, "team_id": _known(self.teams, area, "team")},
            POOL.name: lambda product: {"product": product, "pool_id": _known(self.pools, product, "product")},
            KNOWLEDGE.name: lambda text: {"articles": [f"What to do about {text}"]},
            OUTAGES.name: lambda: {"outages": []},
            POLICY.name: lambda name: {"policy": f"The policy on {name}."},
            UNLOCK.name: unlocked,
            ASSIGN.name: assigned,
            ROUTE.name: routed,
            VERIFY: lambda: {"status": "verified"},
        }, reply=reply, error=lambda text: json.dumps({"error": text}), change=change, gone=self.gone)  # fmt: skip


def _known(table: Mapping[str, Any], key: str, what: str) -> Any:
    if key not in table:
        raise Refused(f"{what} {key} not found")
    return table[key]


# -- what the agent knows --------------------------------------------------------------------------


def _listed(tool: Tool, key: str) -> Callable[[View], list[str]]:
    return lambda view: [value for shown in view.results(tool.name) for value in shown[key]]


def _matching(tool: Tool, key: str, name: str, wanted: str) -> Source:
    def find(view: View) -> str | None:
        shown = [s for s in view.results(tool.name) if isinstance(s, dict)]
        return next((s[wanted] for s in shown if s[key] == view.slots.get(name)), None)

    return find


_device, _ticket = (
    _matching(DEVICE, "kind", "kind", "warranty_until"),
    _matching(TICKET, "subject", "subject", "ticket_id"),
)
_area = _matching(TICKET, "subject", "subject", "area")
_employee = seen(EMPLOYEE.name, "employee_id")
_find = once(EMPLOYEE, badge=slot("badge"))


def _wrong_id(tool: Tool, field: str) -> Callable[[View], Call]:
    return lambda view: Call(tool.name, {field: _employee(view) or "unknown"})


_unlock = once(UNLOCK, account_id=seen(EMPLOYEE.name, "account_id"), slips=(_wrong_id(UNLOCK, "account_id"),))
_account = once(ACCOUNT, account_id=seen(EMPLOYEE.name, "account_id"), slips=(_wrong_id(ACCOUNT, "account_id"),))


def _family(name: str, asks: str, steps: tuple[Step, ...], answer: Callable[[View], str]) -> Family:
    def case(number: int) -> Case:
        chance = random.Random(f"{name}/{number}")
        desk = Desk(chance)
        employee, ticket = desk.employee, desk.ticket
        product, reply = chance.choice(PRODUCTS), chance.choice(names.YES)
        slots = {
            "badge": desk.badge, "name": employee["name"], "product": product, "kind": desk.device["kind"],
            "subject": ticket["subject"],
        }  # fmt: skip
        wanted: dict[str, tuple[tuple[str, Mapping[str, str]], ...]] = {
            "unlock_account": ((UNLOCK.name, {"account_id": employee["account_id"]}),),
            "assign_license": (
                (ASSIGN.name, {"employee_id": employee["employee_id"], "pool_id": desk.pools[product]}),
            ),
            "route_ticket": ((ROUTE.name, {"ticket_id": ticket["ticket_id"], "team_id": desk.teams[ticket["area"]]}),),
        }
        fact = desk.device["warranty_until"] if name == "warranty" else ""
        return Case(slots, reply, wanted.get(name, ()), fact, lambda change: desk.world(change, reply))

    return Family(name, DESK, "{name} here, badge {badge}. " + asks, (_find, *steps), answer, case)


FAMILIES = (
    _family(
        "unlock_account", "I am locked out of my account, can you help?",
        (_account, question("Your account is locked. Shall I unlock it?"), _unlock), lambda _: "It is unlocked.",
    ),
    _family(
        "assign_license", "I need a licence for {product}.",
        (once(POOL, product=slot("product")),
         once(ASSIGN, employee_id=_employee, pool_id=seen(POOL.name, "pool_id"))),
        lambda _: "The licence is yours.",
    ),
    _family(
        "route_ticket", "Please hand my ticket about the {subject} to the right team.",
        (once(TICKETS, employee_id=_employee), until(TICKET, "ticket_id", _listed(TICKETS, "tickets"), _ticket),
         once(TEAM, area=_area), once(ROUTE, ticket_id=_ticket, team_id=seen(TEAM.name, "team_id"))),
        lambda _: "Your ticket is with the right team.",
    ),
    _family(
        "warranty", "Until when does the warranty of my {kind} last?",
        (once(DEVICES, employee_id=_employee), until(DEVICE, "device_id", _listed(DEVICES, "devices"), _device)),
        lambda view: f"Until {_device(view)}.",
    ),
)  # fmt: skip
