"""Tasks with git, each in a repository of its own."""

from __future__ import annotations

from benchmarks.agent_policy import AgentTask, bash

_NEW = "git init -q . && git checkout -q -b main && echo 1 > readme.md && git add . && git commit -q -m start"

GIT = (
    AgentTask(
        "push_branch",
        "Push the branch `%branch%` to the remote.",
        (bash("git pussh origin %branch%", "git push %branch%", "git push", "git push origin %branch%"),),
        "git --git-dir=remote.git rev-parse --verify -q %branch%",
        ({"branch": "main"},),
        f"{_NEW} && git init -q --bare remote.git && git remote add origin ./remote.git",
    ),
    AgentTask(
        "push_topic",
        "Push the topic branch `%branch%` to the remote and let it track the remote's branch.",
        (
            bash(
                "git push --track %branch%",
                "git push --set-upstream %branch%",
                "git push --set-upstream-to=origin %branch%",
                "git push --set-upstream origin %branch%",
            ),
        ),
        "git rev-parse --abbrev-ref %branch%@{upstream}",
        ({"branch": "topic/search"}, {"branch": "topic/billing"}),
        f"{_NEW} && git init -q --bare remote.git && git remote add origin ./remote.git && git checkout -q -b %branch%",
    ),
    AgentTask(
        "commit_file",
        "Commit the new file `%file%` with the message `%message%`.",
        (
            bash(
                'git commit %file% "%message%"',
                'git commit -m "%message%"',
                'git commit -a -m "%message%"',
                'git add %file% && git commit -m "%message%"',
            ),
        ),
        'test "$(git log -1 --format=%s)" = "%message%" && git cat-file -e HEAD:%file%',
        (
            {"file": "notes.md", "message": "Add the notes"},
            {"file": "schema.sql", "message": "Describe the tables"},
        ),
        f"{_NEW} && echo 1 > %file%",
    ),
    AgentTask(
        "new_branch",
        "Create the branch `%branch%` and switch to it.",
        (
            bash(
                "git checkout %branch%",
                "git switch %branch%",
                "git switch --new %branch%",
                "git switch -c %branch%",
            ),
        ),
        'test "$(git rev-parse --abbrev-ref HEAD)" = %branch%',
        ({"branch": "feature/login"},),
        _NEW,
    ),
    AgentTask(
        "delete_branch",
        "Delete the branch `%branch%`, whose work was given up.",
        (
            bash(
                "git delete-branch %branch%",
                "git branch --remove %branch%",
                "git branch -d %branch%",
                "git branch -D %branch%",
            ),
        ),
        "! git rev-parse --verify -q %branch%",
        ({"branch": "spike"}, {"branch": "attempt"}),
        f"{_NEW} && git checkout -q -b %branch% && echo 2 > readme.md && git commit -q -a -m two "
        "&& git checkout -q main",
    ),
    AgentTask(
        "annotated_tag",
        "Tag the last commit as `%tag%` with the message `Release %tag%`.",
        (
            bash(
                'git tag %tag% "Release %tag%"',
                'git tag -m %tag% "Release %tag%"',
                'git tag --annotated %tag% -m "Release %tag%"',
                'git tag -a %tag% -m "Release %tag%"',
            ),
        ),
        'test "$(git cat-file -t %tag%)" = tag',
        ({"tag": "v1.4.0"}, {"tag": "v2.0.1"}),
        _NEW,
    ),
    AgentTask(
        "undo_commit",
        "Undo the last commit, but keep its changes.",
        (
            bash(
                "git undo",
                "git revert --soft HEAD",
                "git reset --keep-changes HEAD~1",
                "git reset --soft HEAD~1",
            ),
        ),
        'test "$(git rev-list --count HEAD)" = 1 && test "$(cat readme.md)" = 2',
        setup=f"{_NEW} && echo 2 > readme.md && git commit -q -a -m two",
    ),
    AgentTask(
        "unstage_file",
        "Take `%file%` out of the next commit, but keep the file as it is.",
        (
            bash(
                "git unstage %file%",
                "git restore -staged %file%",
                "git reset --unstage %file%",
                "git restore --staged %file%",
            ),
        ),
        "git diff --cached --quiet && test -f %file%",
        ({"file": "draft.txt"}, {"file": "scratch.md"}),
        f"{_NEW} && echo 1 > %file% && git add %file%",
    ),
    AgentTask(
        "rename_branch",
        "Rename the branch `%old%` to `%new%`.",
        (
            bash(
                "git rename-branch %old% %new%",
                "git branch --rename %old% %new%",
                "git branch %new% -m %old%",
                "git branch -m %old% %new%",
            ),
        ),
        "git rev-parse --verify -q %new% && ! git rev-parse --verify -q %old%",
        ({"old": "develop", "new": "next"}, {"old": "testing", "new": "candidate"}),
        f"{_NEW} && git branch %old%",
    ),
    AgentTask(
        "set_identity",
        "Set git's `%key%` to `%value%` in this repository.",
        (
            bash(
                "git config --set %key% %value%",
                "git config %key%=%value%",
                "git set-config %key% %value%",
                "git config %key% %value%",
            ),
        ),
        'test "$(git config %key%)" = %value%',
        ({"key": "user.name", "value": "builder"}, {"key": "user.email", "value": "ci@example.com"}),
        _NEW,
    ),
    AgentTask(
        "stash_all",
        "Put all changes aside, new files too, so that the working tree is clean.",
        (
            bash(
                "git shelve",
                "git stash --all-files",
                "git stash push --new-files",
                "git stash push --include-untracked",
            ),
        ),
        'test -z "$(git status --porcelain)" && git stash list | grep -q stash',
        setup=f"{_NEW} && echo 2 > readme.md && echo 1 > new.txt",
    ),
    AgentTask(
        "file_of_branch",
        "Get the file `%file%` as it is in the branch `%branch%`.",
        (
            bash(
                "git checkout %file% %branch%",
                "git restore --from %branch% %file%",
                "git fetch %branch% %file%",
                "git checkout %branch% -- %file%",
            ),
        ),
        'test "$(cat %file%)" = 2',
        ({"file": "menu.txt", "branch": "redesign"}, {"file": "prices.txt", "branch": "spring"}),
        f"{_NEW} && git checkout -q -b %branch% && echo 2 > %file% && git add . && git commit -q -m two "
        "&& git checkout -q main",
    ),
    AgentTask(
        "remote_address",
        "Let the remote `origin` point to `%url%`.",
        (
            bash(
                "git remote add origin %url%",
                "git remote change-url origin %url%",
                "git remote origin set-url %url%",
                "git remote set-url origin %url%",
            ),
        ),
        'test "$(git remote get-url origin)" = %url%',
        ({"url": "../new-home.git"},),
        f"{_NEW} && git remote add origin ../old-home.git",
    ),
    AgentTask(
        "last_subject",
        "Put the subject of the last commit in `%out%`.",
        (
            bash(
                "git log -1 --subject > %out%",
                "git log -1 --format=subject > %out%",
                "git last-commit --format=%s > %out%",
                "git log -1 --format=%s > %out%",
            ),
        ),
        'test "$(cat %out%)" = start',
        ({"out": "subject.txt"},),
        _NEW,
    ),
    AgentTask(
        "move_tracked",
        "Move the tracked file `%file%` into the new folder `%folder%`.",
        (
            bash(
                "git move %file% %folder%/",
                "git mv %file% %folder%/",
                "git mv --parents %file% %folder%/",
                "mkdir -p %folder% && git mv %file% %folder%/",
            ),
        ),
        "git ls-files --error-unmatch %folder%/%file%",
        ({"file": "guide.md", "folder": "docs"}, {"file": "logo.svg", "folder": "images"}),
        f"{_NEW} && echo 1 > %file% && git add . && git commit -q -m more",
    ),
    AgentTask(
        "release",
        "Commit the new file `%file%` as `Prepare %tag%`, tag that commit `%tag%`, and push both to the remote.",
        (
            bash(
                'git commit -m "Prepare %tag%" %file%',
                'git commit -am "Prepare %tag%"',
                'git add %file% && git commit -m "Prepare %tag%"',
            ),
            bash(
                'git tag --annotation "%tag%" %tag%',
                'git tag %tag% -a "%tag%"',
                'git tag %tag% -a -m "%tag%"',
            ),
            bash("git push origin main --with-tags", "git push tags origin main", "git push --tags origin main"),
        ),
        "git --git-dir=remote.git cat-file -e %tag%:%file% && git --git-dir=remote.git cat-file -e main:%file%",
        ({"file": "CHANGES.md", "tag": "v0.9.0"},),
        f"{_NEW} && git init -q --bare remote.git && git remote add origin ./remote.git && echo 1 > %file%",
    ),
    AgentTask(
        "merge_work",
        "Commit what changed in `%file%` as `%message%` on the branch `%branch%`, and merge that branch into `main`.",
        (
            bash(
                'git commit "%message%"',
                'git commit --all --text "%message%"',
                'git commit --all --message "%message%"',
            ),
            bash(
                "git merge %branch% --to main",
                "git merge-into main %branch%",
                "git checkout main && git merge %branch%",
            ),
        ),
        'test "$(git log -1 --format=%s main)" = "%message%"',
        ({"file": "readme.md", "message": "Say more", "branch": "wording"},),
        f"{_NEW} && git checkout -q -b %branch% && echo 2 > %file%",
    ),
)
