"""Tasks with files and folders, done in the shell."""

from __future__ import annotations

from benchmarks.agent_policy import AgentTask, bash, write

FILES = (
    AgentTask(
        "nested_folders",
        "Create the folder `%path%` with all folders above it.",
        (bash("mkdir %path%", "mkdir --with-parents %path%", "mkdir -P %path%", "mkdir -p %path%"),),
        "test -d %path%",
        ({"path": "build/out/logs"}, {"path": "var/cache/pages"}),
    ),
    AgentTask(
        "copy_folder",
        "Copy the folder `%src%` to `%dst%`.",
        (bash("cp %src% %dst%", "cp --folder %src% %dst%", "cp -D %src% %dst%", "cp -r %src% %dst%"),),
        "test -f %dst%/inner/one.txt",
        ({"src": "assets", "dst": "public"}, {"src": "fixtures", "dst": "samples"}),
        "mkdir -p %src%/inner && echo 1 > %src%/inner/one.txt",
    ),
    AgentTask(
        "remove_folder",
        "Delete the folder `%path%` and all that is in it.",
        (bash("rm %path%", "rmdir %path%", "rm -d %path%", "rm -r %path%"),),
        "test ! -e %path%",
        ({"path": "old_build"},),
        "mkdir -p %path%/inner && echo 1 > %path%/inner/one.txt",
    ),
    AgentTask(
        "run_script",
        "Run the script `%script%` that lies in this folder.",
        (bash("%script%", "./%script%", "exec ./%script%", "chmod +x %script% && ./%script%"),),
        "test -f ran.txt",
        ({"script": "deploy.sh"},),
        "printf '#!/bin/sh\\necho yes > ran.txt\\n' > %script%",
    ),
    AgentTask(
        "name_with_space",
        "Move the file `%file%` into the folder `%folder%`.",
        (bash("mv %file% %folder%", "mv -f %file% %folder%", "mv -- %file% %folder%/", 'mv "%file%" %folder%'),),
        'test -f "%folder%/%file%"',
        ({"file": "annual report.txt", "folder": "archive"}, {"file": "board minutes.txt", "folder": "records"}),
        'mkdir %folder% && echo 1 > "%file%"',
    ),
    AgentTask(
        "pack_archive",
        "Pack the folder `%src%` into the archive `%archive%`.",
        (
            bash(
                "tar %archive% %src%",
                "tar --gzip --create --archive %archive% %src%",
                "tar -czf %src% %archive%",
                "tar -czf %archive% %src%",
            ),
        ),
        "tar -tzf %archive% | grep -q %src%/one.txt",
        ({"src": "reports", "archive": "reports.tar.gz"}, {"src": "invoices", "archive": "invoices.tgz"}),
        "mkdir %src% && echo 1 > %src%/one.txt",
    ),
    AgentTask(
        "unpack_archive",
        "Unpack `%archive%` into the folder `%folder%`.",
        (
            bash(
                "tar -xzf %archive% %folder%",
                "tar -xzf %archive% --into %folder%",
                "tar -xzf %archive% -C %folder%",
                "mkdir -p %folder% && tar -xzf %archive% -C %folder%",
            ),
        ),
        "test -f %folder%/one.txt",
        ({"archive": "data.tar.gz", "folder": "unpacked"},),
        "echo 1 > one.txt && tar -czf %archive% one.txt && rm one.txt",
    ),
    AgentTask(
        "replace_link",
        "Make `%link%` a symbolic link to `%target%`, in place of the old link.",
        (
            bash(
                "ln %target% %link%",
                "ln -s %target% %link%",
                "ln -s --replace %target% %link%",
                "ln -sf %target% %link%",
            ),
        ),
        'test "$(readlink %link%)" = %target%',
        ({"link": "current.cfg", "target": "v2.cfg"}, {"link": "active.ini", "target": "blue.ini"}),
        "echo 1 > %target% && echo 0 > before && ln -s before %link%",
    ),
    AgentTask(
        "replace_text",
        "Replace `%old%` by `%new%` everywhere in the file `%file%`.",
        (
            bash(
                "sed --replace s/%old%/%new% %file%",
                "sed -i s/%old%/%new% %file%",
                "sed -i.bak 's/%old%/%new%' %file%",
                "sed -i.bak 's/%old%/%new%/g' %file%",
            ),
        ),
        "grep -q %new% %file% && ! grep -q %old% %file%",
        (
            {"old": "colour", "new": "color", "file": "style.txt"},
            {"old": "staging", "new": "production", "file": "hosts.txt"},
        ),
        "printf '%old% and %old%\\n%old%\\n' > %file%",
    ),
    AgentTask(
        "delete_by_ending",
        "Delete all files under this folder whose names end in `.%ending%`.",
        (
            bash(
                "find . -name *.%ending% -delete",
                "find . --name '*.%ending%' -delete",
                "find . -name '*.%ending%' -remove",
                "find . -name '*.%ending%' -delete",
            ),
        ),
        "test -z \"$(find . -name '*.%ending%')\" && test -f inner/keep.txt",
        ({"ending": "tmp"}, {"ending": "orig"}),
        "mkdir inner && touch a.%ending% b.%ending% inner/c.%ending% inner/keep.txt",
    ),
    AgentTask(
        "private_file",
        "Let nobody but its owner read or write `%file%`.",
        (bash("chmod %file% 600", "chmod owner=rw %file%", "chmod 0o600 %file%", "chmod 600 %file%"),),
        "python3 -c \"import os, sys; sys.exit(os.stat('%file%').st_mode & 0o777 != 0o600)\"",
        ({"file": "secrets.env"}, {"file": "token.txt"}),
        "echo 1 > %file% && chmod 644 %file%",
    ),
    AgentTask(
        "split_file",
        "Split `%file%` into parts of 2 lines whose names start with `%prefix%`.",
        (
            bash(
                "split 2 %file% %prefix%",
                "split --lines-per-file=2 %file% %prefix%",
                "split -l two %file% %prefix%",
                "split -l 2 %file% %prefix%",
            ),
        ),
        "test -f %prefix%aa && test -f %prefix%ab",
        ({"file": "rows.txt", "prefix": "part_"},),
        "printf '1\\n2\\n3\\n4\\n' > %file%",
    ),
    AgentTask(
        "sort_numbers",
        "Sort the numbers in `%file%` by their value and put them in `%out%`.",
        (
            bash(
                "sort --by-number %file% -o %out%",
                "sort -N %file% -o %out%",
                "sort -n %file% -o",
                "sort -n %file% -o %out%",
            ),
        ),
        'test "$(head -n 1 %out%)" = 2',
        ({"file": "scores.txt", "out": "ranked.txt"}, {"file": "ages.txt", "out": "ordered.txt"}),
        "printf '10\\n2\\n33\\n' > %file%",
    ),
    AgentTask(
        "with_variable",
        "Run `%script%` with the environment variable `%var%` set to `%value%`.",
        (
            bash(
                "%var% = %value% bash %script%",
                "set %var%=%value% && bash %script%",
                "env %var% %value% bash %script%",
                "%var%=%value% bash %script%",
            ),
        ),
        'test "$(cat seen.txt)" = %value%',
        (
            {"script": "report.sh", "var": "REGION", "value": "north"},
            {"script": "export.sh", "var": "STAGE", "value": "beta"},
        ),
        "printf ': \"${%var%:?}\"\\necho $%var% > seen.txt\\n' > %script%",
    ),
    AgentTask(
        "first_lines",
        "Put the first 3 lines of `%file%` in `%out%`.",
        (
            bash(
                "head 3 %file% > %out%",
                "head -lines 3 %file% > %out%",
                "head --count=3 %file% > %out%",
                "head -n 3 %file% > %out%",
            ),
        ),
        "test \"$(wc -l < %out% | tr -d ' ')\" = 3",
        ({"file": "log.txt", "out": "top.txt"},),
        "printf '1\\n2\\n3\\n4\\n5\\n' > %file%",
    ),
    AgentTask(
        "second_column",
        "Put the second column of the comma-separated file `%file%` in `%out%`.",
        (
            bash(
                "cut -d ',' %file% > %out%",
                "cut -c, -f2 %file% > %out%",
                "cut -d ', ' -f 2 %file% > %out%",
                "cut -d ',' -f 2 %file% > %out%",
            ),
        ),
        'test "$(head -n 1 %out%)" = b',
        ({"file": "people.csv", "out": "names.txt"}, {"file": "cities.csv", "out": "codes.txt"}),
        "printf 'a,b,c\\nd,e,f\\n' > %file%",
    ),
    AgentTask(
        "empty_file",
        "Create an empty file in the new folder `%folder%`, called `%file%`.",
        (
            bash(
                "touch %folder%/%file%",
                "touch --parents %folder%/%file%",
                "touch -p %folder%/%file%",
                "mkdir -p %folder% && touch %folder%/%file%",
            ),
        ),
        "test -f %folder%/%file%",
        ({"folder": "state/locks", "file": "main.lock"}, {"folder": "run/flags", "file": "ready.flag"}),
    ),
    AgentTask(
        "module_in_library",
        "Write the module `%module%` with the text `LIMIT = 5` to the library folder, and see that it compiles.",
        (
            write("LIMIT = 5\n", "/workspace/%module%.py", "src/%module%.py", "library/%module%.py", "lib/%module%.py"),
            bash(
                "python3 -m pycompile lib/%module%.py",
                "python3 -m py_compile %module%.py",
                "python3 -m py_compile lib/%module%.py",
            ),
        ),
        "grep -q 'LIMIT = 5' lib/%module%.py",
        ({"module": "limits"}, {"module": "quotas"}),
        "mkdir lib",
    ),
    AgentTask(
        "settings_file",
        "Write the settings file of the service `%service%` with the text `debug = false`.",
        (
            write(
                "debug = false\n",
                "/etc/%service%.ini",
                "settings/%service%.ini",
                "conf/%service%.ini",
                "config/%service%.ini",
            ),
        ),
        "grep -q 'debug = false' config/%service%.ini",
        ({"service": "mailer"},),
        "mkdir config && echo 'debug = true' > config/other.ini",
    ),
)
