"""Tasks done in Python: data, databases, packages and tests."""

from __future__ import annotations

from benchmarks.agent_policy import AgentTask, bash, python, write

_DATABASE = (
    "python3 -c \"import sqlite3; d = sqlite3.connect('%db%'); d.execute('create table %table% (id integer, full_name "
    "text, city text)'); d.executemany('insert into %table% values (?, ?, ?)', [(1, 'Ada', 'Bonn'), (2, 'Bo', 'Bonn'), "
    "(3, 'Cy', 'Ulm')]); d.commit()\""
)
_QUERY = 'import sqlite3; rows = sqlite3.connect("%db%").execute("{}").fetchall(); open("%out%", "w").write(str(rows))'
_INSERT = "import sqlite3\ndb = sqlite3.connect('%db%')\ndb.execute(\"{}\")\ndb.commit()"
_PACKAGE = "mkdir -p %package% && touch %package%/__init__.py && echo 'NAME = 1' > %package%/core.py"

PYTHON = (
    AgentTask(
        "single_quotes",
        "Write the value of `%key%` in the settings `%file%` to `%out%`.",
        (
            python(
                'import json; value = json.load(open("%file%"))["%key%"]; open("%out%", "w").write(str(value))',
                'import json; value = json.loads(open("%file%").read(), strict=False)["%key%"]; '
                'open("%out%", "w").write(str(value))',
                'import json5; value = json5.load(open("%file%"))["%key%"]; open("%out%", "w").write(str(value))',
                'import ast; value = ast.literal_eval(open("%file%").read())["%key%"]; '
                'open("%out%", "w").write(str(value))',
            ),
        ),
        "grep -qx 30 %out%",
        ({"key": "timeout", "file": "service.conf", "out": "timeout.txt"},),
        "echo \"{'%key%': 30, 'name': 'x'}\" > %file%",
    ),
    AgentTask(
        "count_word",
        "Count how often `%word%` is in `%file%`, and write the number to `%out%`.",
        (
            python(
                'print open("%file%").read().count("%word%")',
                'open("%out%", "w").write(open("%file%").read().count("%word%")',
                'open("%out%", "w").write(open("%file%").read().count("%word%"))',
                'open("%out%", "w").write(str(open("%file%").read().count("%word%")))',
            ),
        ),
        "grep -qx 2 %out%",
        ({"word": "error", "file": "app.log", "out": "errors.txt"},),
        "printf '%word% one\\n%word% two\\nthree\\n' > %file%",
    ),
    AgentTask(
        "write_json",
        "Write a JSON file `%out%` that holds `%key%` with the value 1.",
        (
            python(
                'json.dump({"%key%": 1}, open("%out%", "w"))',
                'import json; json.dump({"%key%": 1}, "%out%")',
                'import json; json.write({"%key%": 1}, open("%out%", "w"))',
                'import json; json.dump({"%key%": 1}, open("%out%", "w"))',
            ),
        ),
        "python3 -c \"import json, sys; sys.exit(json.load(open('%out%')) != {'%key%': 1})\"",
        ({"out": "flags.json", "key": "beta"}, {"out": "limits.json", "key": "workers"}),
    ),
    AgentTask(
        "select_names",
        "Write all names in the table `%table%` of the SQLite database `%db%` to `%out%`.",
        (
            python(
                _QUERY.format("SELECT name FROM %table%"),
                _QUERY.format("SELECT fullname FROM %table%"),
                _QUERY.format("SELECT full name FROM %table%"),
                _QUERY.format("SELECT full_name FROM %table%"),
            ),
        ),
        "grep -q Ada %out%",
        (
            {"table": "customers", "db": "shop.db", "out": "names.txt"},
            {"table": "members", "db": "club.db", "out": "people.txt"},
        ),
        _DATABASE,
    ),
    AgentTask(
        "insert_row",
        "Add a row with the id 7 and the name Eve to the table `%table%` of the SQLite database `%db%`.",
        (
            python(
                _INSERT.format("INSERT INTO %table% VALUES (7, 'Eve')"),
                _INSERT.format("INSERT INTO %table% (id, name) VALUES (7, 'Eve')"),
                _INSERT.format("INSERT %table% (id, full_name) VALUES (7, 'Eve')"),
                _INSERT.format("INSERT INTO %table% (id, full_name) VALUES (7, 'Eve')"),
            ),
        ),
        "python3 -c \"import sqlite3, sys; r = sqlite3.connect('%db%').execute('select full_name from %table% where "
        "id = 7').fetchall(); sys.exit(r != [('Eve',)])\"",
        ({"table": "guests", "db": "hotel.db"},),
        _DATABASE,
    ),
    AgentTask(
        "group_rows",
        "Write the cities that more than one row of `%table%` in the SQLite database `%db%` has to `%out%`.",
        (
            python(
                _QUERY.format("SELECT city FROM %table% WHERE count(*) > 1 GROUP BY city"),
                _QUERY.format("SELECT city FROM %table% GROUP BY city WHERE count(*) > 1"),
                _QUERY.format("SELECT city FROM %table% GROUP city HAVING count(*) > 1"),
                _QUERY.format("SELECT city FROM %table% GROUP BY city HAVING count(*) > 1"),
            ),
        ),
        "grep -q Bonn %out% && ! grep -q Ulm %out%",
        ({"table": "orders", "db": "sales.db", "out": "cities.txt"},),
        _DATABASE,
    ),
    AgentTask(
        "first_row",
        "Write the field `%field%` of the first row of `%file%`, which has a header, to `%out%`.",
        (
            python(
                'import csv; row = csv.DictReader(open("%file%"))[0]; open("%out%", "w").write(row["%field%"])',
                'import csv; row = csv.read(open("%file%"))[0]; open("%out%", "w").write(row["%field%"])',
                'import csv; row = csv.DictReader(open("%file%")).rows[0]; open("%out%", "w").write(row["%field%"])',
                'import csv; row = list(csv.DictReader(open("%file%")))[0]; open("%out%", "w").write(row["%field%"])',
            ),
        ),
        "grep -qx 12 %out%",
        (
            {"field": "price", "file": "items.csv", "out": "price.txt"},
            {"field": "weight", "file": "parcels.csv", "out": "weight.txt"},
        ),
        "printf 'id,%field%\\n1,12\\n2,13\\n' > %file%",
    ),
    AgentTask(
        "path_parents",
        "With pathlib, create the folder `%path%` and the folders above it.",
        (
            python(
                'from pathlib import Path; Path("%path%").mkdir()',
                'from pathlib import Path; Path("%path%").mkdir(parent=True)',
                'from pathlib import Path; Path("%path%").makedirs()',
                'from pathlib import Path; Path("%path%").mkdir(parents=True)',
            ),
        ),
        "test -d %path%",
        ({"path": "spool/in/new"},),
    ),
    AgentTask(
        "weekday",
        "Write the weekday (0 for Monday) of `%date%` to `%out%`.",
        (
            python(
                'import datetime; day = datetime.strptime("%date%", "%Y-%m-%d"); '
                'open("%out%", "w").write(str(day.weekday()))',
                'from datetime import strptime; day = strptime("%date%", "%Y-%m-%d"); '
                'open("%out%", "w").write(str(day.weekday()))',
                'import datetime; day = datetime.datetime.strptime("%date%", "%d.%m.%Y"); '
                'open("%out%", "w").write(str(day.weekday()))',
                'import datetime; day = datetime.datetime.strptime("%date%", "%Y-%m-%d"); '
                'open("%out%", "w").write(str(day.weekday()))',
            ),
        ),
        "grep -qx 0 %out%",
        ({"date": "2024-01-01", "out": "day.txt"},),
    ),
    AgentTask(
        "old_encoding",
        "Write the text of `%file%`, which comes from an old system, to `%out%` in UTF-8.",
        (
            python(
                'text = open("%file%").read(); open("%out%", "w").write(text)',
                'text = open("%file%", encoding="ascii").read(); open("%out%", "w").write(text)',
                'text = open("%file%", "rb").read(); open("%out%", "w").write(text)',
                'text = open("%file%", encoding="latin-1").read(); open("%out%", "w").write(text)',
            ),
        ),
        "python3 -c \"import sys; sys.exit(open('%out%').read() != 'caf\\u00e9')\"",
        ({"file": "legacy.txt", "out": "modern.txt"},),
        "printf 'caf\\351' > %file%",
    ),
    AgentTask(
        "merge_folders",
        "With shutil, copy what is in the folder `%src%` into the folder `%dst%`, which is there already.",
        (
            python(
                'import shutil; shutil.copy("%src%", "%dst%")',
                'import shutil; shutil.copytree("%src%", "%dst%")',
                'import shutil; shutil.copytree("%src%", "%dst%", exist_ok=True)',
                'import shutil; shutil.copytree("%src%", "%dst%", dirs_exist_ok=True)',
            ),
        ),
        "test -f %dst%/one.txt",
        ({"src": "theme", "dst": "site"},),
        "mkdir %src% %dst% && echo 1 > %src%/one.txt",
    ),
    AgentTask(
        "output_to_file",
        "With subprocess, run `sort` on `%file%` and put what it prints in `%out%`.",
        (
            python(
                'import subprocess; subprocess.run("sort %file%", check=True, stdout=open("%out%", "w"))',
                'import subprocess; subprocess.run(["sort %file%"], check=True, stdout=open("%out%", "w"))',
                'import subprocess; subprocess.run(["sort", "%file%"], check=True, stdout="%out%")',
                'import subprocess; subprocess.run(["sort", "%file%"], check=True, stdout=open("%out%", "w"))',
            ),
        ),
        'test "$(head -n 1 %out%)" = a',
        ({"file": "words.txt", "out": "sorted.txt"}, {"file": "tags.txt", "out": "tidy.txt"}),
        "printf 'b\\na\\n' > %file%",
    ),
    AgentTask(
        "run_tests",
        "Run the unit tests in the folder `%folder%`.",
        (
            bash(
                "python3 -m unitest discover -s %folder%",
                "python3 unittest discover -s %folder%",
                "python3 -m unittest discover --folder %folder%",
                "python3 -m unittest discover -s %folder%",
            ),
        ),
        "test -f tested.txt",
        ({"folder": "checks"}, {"folder": "suite"}),
        "mkdir %folder% && printf 'import unittest\\nclass T(unittest.TestCase):\\n    def test_it(self):\\n        "
        'open("tested.txt", "w").close()\\n\' > %folder%/test_it.py',
    ),
    AgentTask(
        "run_module",
        "Run the program that is the module `main` of the package `%package%`.",
        (
            bash(
                "python3 %package%/main.py",
                "python3 %package%.main",
                "python3 -m %package%/main.py",
                "python3 -m %package%.main",
            ),
        ),
        "test -f ran.txt",
        ({"package": "crawler"}, {"package": "planner"}),
        f'{_PACKAGE} && printf \'from .core import NAME\\nopen("ran.txt", "w").close()\\n\' > %package%/main.py',
    ),
    AgentTask(
        "source_layout",
        "Run the package `%package%`, whose code is in the folder `src`.",
        (
            bash(
                "python3 -m %package%",
                "python3 -m src.%package%",
                "python3 src/%package%",
                "PYTHONPATH=src python3 -m %package%",
            ),
        ),
        "test -f ran.txt",
        ({"package": "billing"},),
        'mkdir -p src/%package% && touch src/%package%/__init__.py && printf \'import %package%\\nopen("ran.txt", '
        '"w").close()\\n\' > src/%package%/__main__.py',
    ),
    AgentTask(
        "format_json",
        "Format the JSON file `%file%` with Python's own tool, into `%out%`.",
        (
            bash(
                "python3 -m jsontool %file% %out%",
                "python3 -m json.tool --pretty %file% %out%",
                "python3 -m json.tool %file% --outfile %out%",
                "python3 -m json.tool %file% %out%",
            ),
        ),
        "test -s %out%",
        ({"file": "raw.json", "out": "pretty.json"}, {"file": "dump.json", "out": "readable.json"}),
        "echo '{\"a\": 1}' > %file%",
    ),
    AgentTask(
        "new_package",
        "Make the package `%package%` with a module `core` that holds `READY = True`, and see that it can be imported.",
        (
            bash(
                "touch %package%/__init__.py",
                "mkdir %package%/__init__.py",
                "mkdir -p %package% && touch %package%/__init__.py",
            ),
            write("READY = True\n", "/workspace/%package%/core.py", "src/%package%/core.py", "%package%/core.py"),
            bash(
                "python3 -c import %package%.core",
                "python3 --command 'import %package%.core'",
                "python3 -c 'import %package%.core'",
            ),
        ),
        "grep -q READY %package%/core.py && test -f %package%/__init__.py",
        ({"package": "engine"}, {"package": "ledger"}),
    ),
    AgentTask(
        "build_database",
        "Make the SQLite database `%db%` with a table `%table%` of an id and a title, and put the title `one` in it.",
        (
            python(
                _INSERT.format("CREATE TABLE %table% id INTEGER, title TEXT"),
                _INSERT.format("CREATE TABLE %table% (id INTEGER title, TEXT,)"),
                _INSERT.format("CREATE TABLE %table% (id INTEGER, title TEXT)"),
            ),
            python(
                _INSERT.format("INSERT INTO %table% (title) VALUES ('one'"),
                _INSERT.format("INSERT INTO %table% (title) VALUE ('one')"),
                _INSERT.format("INSERT INTO %table% (title) VALUES ('one')"),
            ),
        ),
        "python3 -c \"import sqlite3, sys; r = sqlite3.connect('%db%').execute('select title from %table%').fetchall()"
        "; sys.exit(r != [('one',)])\"",
        ({"db": "books.db", "table": "books"},),
    ),
)
