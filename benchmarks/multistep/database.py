"""The database: questions that are answered by SQL on a real SQLite database in memory, and submitted."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.agent_policy import Call
from benchmarks.multistep import names
from benchmarks.multistep.task import Case, Domain, Family, Source, once
from benchmarks.multistep.view import View
from benchmarks.multistep.world import SUBMIT, VERIFY, Change, Refused, Tool, World

TABLES = Tool("list_tables", "List the tables.")
DESCRIBE = Tool("describe_table", "Show the columns of a table.", ("table",))
SQL = Tool("sql", "Run a query on the database, which is read-only.", ("query",))
ANSWER = Tool(SUBMIT, "Submit the answer, which ends the task.", ("answer",), writes=True)
IDENTITY = Tool(VERIFY, "Verify the user's identity for this session.")
# Where a column was dropped, its values are in the one of the other name.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "clients": ("client_no", "full_name", "city"),
    "sales": ("sale_no", "client_no", "net_total", "sold_on"),
    "articles": ("article_no", "label", "maker", "list_price"),
    "shipments": ("shipment_no", "dest_city", "days_late"),
    "staff": ("staff_no", "full_name", "branch"),
}
DROPPED = {"net_total": "gross_total", "list_price": "unit_price", "days_late": "delay_days"}
FRONTS = ("Bright", "Nord", "Iron", "Blue", "Oak", "Silver", "Red", "Stone", "Fair", "High", "West", "Lang", "Clear")
MAKER_ENDS = ("works", "hem", "leaf", "pine", "fin", "craft", "line", "forge", "lab", "mark", "well")
CITY_ENDS = ("ford", "bury", "ton", "ham", "mouth", "field", "port", "stead", "wick", "dale", "by")

DATABASE = Domain(
    "database",
    "You answer questions about a company's database. Submit the answer with the tool `submit`: the value alone.",
    (TABLES, DESCRIBE, SQL, ANSWER, IDENTITY),
    (
        Call(TABLES.name, {}),
        Call(DESCRIBE.name, {"table": "orders"}),
        Call(DESCRIBE.name, {"table": "customers"}),
        Call(DESCRIBE.name, {"table": "products"}),
        Call(DESCRIBE.name, {"table": "staff"}),
        Call(SQL.name, {"query": "SELECT * FROM orders LIMIT 5"}),
        Call(SQL.name, {"query": "SELECT * FROM customers LIMIT 5"}),
        Call(SQL.name, {"query": "SELECT * FROM deliveries LIMIT 5"}),
        Call(SQL.name, {"query": "SELECT name FROM products"}),
        Call(SQL.name, {"query": "SELECT COUNT(*) FROM staff"}),
        Call(SQL.name, {"query": "SHOW TABLES"}),
    ),
    allowed=(ANSWER.name,),
)  # fmt: skip


class Rows:
    """The rows of one task's database."""

    def __init__(self, chance: random.Random) -> None:
        people = names.distinct(chance, [f"{f} {n}" for f in names.FIRST for n in names.LAST], 8)
        makers, cities = (
            names.distinct(chance, [front + end for front in FRONTS for end in ends], 8)
            for ends in (MAKER_ENDS, CITY_ENDS)
        )
        self.rows: dict[str, list[tuple[Any, ...]]] = {
            "clients": [(n, who, chance.choice(names.CITIES)) for n, who in enumerate(people, 1)],
            "sales": [
                (n, chance.randrange(1, 9), chance.randrange(100, 9000), f"2025-0{chance.randrange(1, 9)}-11")
                for n in range(1, 61)
            ],
            "articles": [
                (n, f"{names.ITEMS[n % len(names.ITEMS)]} {n}", makers[n % 8], chance.randrange(5, 900))
                for n in range(1, 41)
            ],
            "shipments": [(n, cities[n % 8], max(0, chance.randrange(-4, 6))) for n in range(1, 121)],
            "staff": [(n, who, chance.choice(names.CITIES)) for n, who in enumerate(people, 1)],
        }
        self.slots = {
            "client": chance.choice(people), "maker": chance.choice(makers), "city": chance.choice(cities),
        }  # fmt: skip

    def connect(self, *, dropped: bool = False) -> sqlite3.Connection:
        """Return the database, with the columns of other names if they were dropped."""
        made = sqlite3.connect(":memory:", check_same_thread=False)
        for table, rows in self.rows.items():
            columns = [DROPPED.get(c, c) if dropped else c for c in COLUMNS[table]]
            made.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
            made.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", rows)
        made.execute("PRAGMA query_only = 1")
        return made

    def world(self, change: Change) -> World:
        """Return the tools on this database."""
        made = self.connect(dropped=change.kind == "column_dropped")

        def described(table: str) -> dict[str, Any]:
            found = [row[1] for row in made.execute("SELECT * FROM pragma_table_info(?)", (table,))]
            if not found:
                raise Refused(f"no such table: {table}")
            return {"table": table, "columns": found}

        return World(DATABASE.tools, {
            TABLES.name: lambda: {"tables": sorted(COLUMNS)},
            DESCRIBE.name: described,
            SQL.name: lambda query: _rows(made, query),
            SUBMIT: lambda answer: f"Submitted: {answer}",
            VERIFY: lambda: "Identity verified.",
        }, reply="", error=lambda text: f"Error executing query: {text}", change=change)  # fmt: skip


def _rows(database: sqlite3.Connection, query: str) -> dict[str, Any]:
    try:
        cursor = database.execute(query)
        return {"columns": [d[0] for d in cursor.description or ()], "rows": cursor.fetchmany(20)}
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise Refused(str(error)) from None


# -- what the agent knows --------------------------------------------------------------------------


def composed(query: str) -> Source:
    """Return the source of a query that the agent writes itself, by the columns that it has seen."""

    def write(view: View) -> str:
        columns = {c for shown in view.results(DESCRIBE.name) for c in shown["columns"]}
        written = query.format(**view.slots)
        for column, other in DROPPED.items():
            if other in columns:
                written = written.replace(column, other)
        return written

    return write


def _first_value(query: Source) -> Source:
    def find(view: View) -> str | None:
        written = query(view)
        results = [m.shown for m in view.made if m.tool == SQL.name and m.arguments.get("query") == written]
        return next((str(s["rows"][0][0]) for s in reversed(results) if isinstance(s, dict) and s.get("rows")), None)

    return find


def _constant(text: str) -> Source:
    return lambda _view: text


def _wrong(query: str) -> Callable[[View], Call]:
    return lambda view: Call(SQL.name, {"query": query.format(**view.slots)})


def _family(name: str, asks: str, tables: tuple[str, ...], query: str, wrong: str) -> Family:
    def case(number: int) -> Case:
        rows = Rows(random.Random(f"{name}/{number}"))
        fact = str(rows.connect().execute(query.format(**rows.slots)).fetchone()[0])
        return Case(rows.slots, "", (), fact, rows.world)

    source = composed(query)
    steps = [once(DESCRIBE, table=_constant(table)) for table in tables]
    steps += [once(SQL, query=source, slips=(_wrong(wrong),)), once(ANSWER, answer=_first_value(source))]
    return Family(name, DATABASE, asks, tuple(steps), lambda _: "Done.", case)


FAMILIES = (
    _family(
        "spent", "How much did the client {client} spend in all?", ("clients", "sales"),
        "SELECT SUM(net_total) FROM sales JOIN clients USING (client_no) WHERE full_name = '{client}'",
        "SELECT SUM(total) FROM sales WHERE client = '{client}'",
    ),
    _family(
        "dearest", "Which price has the most expensive article of the maker {maker}?", ("articles",),
        "SELECT MAX(list_price) FROM articles WHERE maker = '{maker}'",
        "SELECT MAX(price) FROM articles WHERE maker = '{maker}'",
    ),
    _family(
        "late", "How many shipments to {city} were late?", ("shipments",),
        "SELECT COUNT(*) FROM shipments WHERE dest_city = '{city}' AND days_late > 0",
        "SELECT COUNT(*) FROM shipments WHERE city = '{city}' AND late = 1",
    ),
)  # fmt: skip
