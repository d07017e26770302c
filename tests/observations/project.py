"""The small projects that the recorded commands work on: path → text; many are broken on purpose."""

from __future__ import annotations

PYTHON = {
    "py/calc.py": "def add(a, b):\n    return a + b\n\n\ndef div(a, b):\n    return a / b\n",
    "py/test_calc.py": (
        "from calc import add, div\n\n\ndef test_add():\n    assert add(1, 2) == 3\n\n\n"
        "def test_div():\n    assert div(4, 2) == 2\n"
    ),
    "py/test_wrong.py": (
        "from calc import add, div\n\n\ndef test_sum():\n    assert add(1, 2) == 4\n\n\n"
        "def test_zero():\n    assert div(1, 0) == 0\n\n\ndef test_fine():\n    assert add(0, 0) == 0\n"
    ),
    "py/test_import.py": "from calc import multiply\n\n\ndef test_it():\n    assert multiply(1, 2) == 2\n",
    "py/test_fixture.py": "def test_needs(database):\n    assert database\n",
    "py/test_skips.py": (
        "import pytest\n\n\n@pytest.mark.skip(reason='error handling comes later')\ndef test_later():\n    pass\n\n\n"
        "@pytest.mark.xfail\ndef test_known_error():\n    raise ValueError('known')\n\n\ndef test_ok():\n    pass\n"
    ),
    "py/test_prints.py": "def test_prints():\n    print('Error: 3 failed, this is only printed')\n",
    "py/unit_ok.py": (
        "import unittest\n\n\nclass Good(unittest.TestCase):\n    def test_one(self):\n"
        "        self.assertEqual(1, 1)\n\n"
        "    def test_error_is_raised(self):\n        with self.assertRaises(ValueError):\n            int('x')\n\n\n"
        "if __name__ == '__main__':\n    unittest.main()\n"
    ),
    "py/unit_bad.py": (
        "import unittest\n\n\nclass Bad(unittest.TestCase):\n    def test_one(self):\n"
        "        self.assertEqual(1, 2)\n\n"
        "    def test_two(self):\n        {}['missing']\n\n\nif __name__ == '__main__':\n    unittest.main()\n"
    ),
    "py/key.py": "config = {'host': 'a'}\n\n\ndef port():\n    return config['port']\n\n\nprint('starting')\nport()\n",
    "py/chain.py": (
        "import json\n\n\ndef load(text):\n    try:\n        return json.loads(text)\n    except ValueError as error:\n"
        "        raise RuntimeError('cannot read settings') from error\n\n\nload('{oops')\n"
    ),
    "py/syntax.py": "def f(:\n    return 1\n",
    "py/indent.py": "def f():\nreturn 1\n",
    "py/missing.py": "import no_such_module_here\n",
    "py/opens.py": "open('settings.toml')\n",
    "py/quits.py": "import sys\n\nsys.exit('cannot continue: no input given')\n",
    "py/silent.py": "import sys\n\nsys.exit(3)\n",
    "py/logs.py": (
        "import logging\n\nlogging.basicConfig()\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n"
        "    logging.exception('could not divide, going on')\nprint('wrote 3 rows')\n"
    ),
    "py/caught.py": "try:\n    int('x')\nexcept ValueError as error:\n    print(f'Error: {error}')\n",
    "py/boasts.py": "import sys\n\nprint('All done, everything succeeded! 12 passed')\nsys.exit(1)\n",
    "py/happy.py": "print('All done, 0 failed, no errors')\n",
    "py/words.py": "for word in ('error', 'failed', 'Traceback', 'fatal'):\n    print('about', word)\n",
    "py/recurse.py": "def f(n):\n    return f(n + 1)\n\n\nf(0)\n",
    "py/args.py": (
        "import argparse\n\np = argparse.ArgumentParser()\np.add_argument('--size', type=int)\np.parse_args()\n"
    ),
    "py/custom.py": (
        "class QuotaExceeded(Exception):\n    pass\n\n\nraise QuotaExceeded('user 4711 is over 90% of 500 MB')\n"
    ),
    "py/group.py": "raise ExceptionGroup('two', [ValueError('a'), TypeError('b')])\n",
    "py/interrupted.py": "import os, signal\n\nos.kill(os.getpid(), signal.SIGINT)\nimport time\n\ntime.sleep(1)\n",
    "py/typed.py": "def double(x: int) -> int:\n    return x * 2\n\n\ndouble('a')\ny: str = double(2)\n",
    "py/typed_ok.py": "def double(x: int) -> int:\n    return x * 2\n\n\nprint(double(2))\n",
    "py/lint.py": "import os\nimport sys\n\nx = undefined_name\n",
    "py/Makefile": "test:\n\tpython -m pytest -q test_wrong.py\nok:\n\tpython -m pytest -q test_calc.py\n",
}

TEXTS = {
    "notes/NOTES.md": (
        "# Error handling\n\nWhen the server answers `error: connection refused`, wait and try again.\n"
        "`FAILED` in the last line means that tests failed:\n\n    1 failed, 2 passed in 0.12s\n\n"
        "A missing command looks like this:\n\n    bash: frob: command not found\n"
    ),
    "notes/build.log": (
        "2024-03-01 10:00:01 INFO starting build 1842\n2024-03-01 10:00:05 ERROR worker 3 died\n"
        'Traceback (most recent call last):\n  File "/srv/app/run.py", line 10, in <module>\n    main()\n'
        "  File \"/srv/app/run.py\", line 6, in main\n    raise ValueError('bad batch')\nValueError: bad batch\n"
    ),
    "notes/ci.log": (
        "collected 3 items\n\ntest_a.py .F.                 [100%]\n\nFAILED test_a.py::test_b - assert 1 == 2\n"
        "========================= 1 failed, 2 passed in 0.12s ==========================\n"
    ),
    "notes/gcc.log": "main.c:3:5: error: expected ';' before 'return'\nmake: *** [Makefile:2: main.o] Error 1\n",
    "notes/last_run.json": '{"status": "error", "error": "connection refused", "exit_code": 1}\n',
    "notes/exit.txt": "Exit code: 1\nThe deploy ended so on Tuesday.\n",
    "notes/good.log": "BUILD SUCCESS\n12 passed in 3.4s\n",
    "notes/CHANGES.md": "- fixed: TypeError: unsupported operand when a row is empty\n- fatal: now says which file\n",
    "notes/names.txt": "ada\nbob\neve\n",
    "notes/other.txt": "ada\nbob\nzoe\n",
    "notes/server.py": (
        "def handle(error):\n    if error.code == 404:\n        print('Error: not found')\n"
        "        raise SystemExit('fatal: giving up')\n"
    ),
}

NATIVE = {
    "c/ok.c": '#include <stdio.h>\nint main(void) { puts("hello"); return 0; }\n',
    "c/semicolon.c": "int main(void) {\n  int x = 1\n  return x;\n}\n",
    "c/undeclared.c": "int main(void) {\n  return total;\n}\n",
    "c/link.c": "int helper(int);\nint main(void) { return helper(1); }\n",
    "c/header.c": '#include "nowhere.h"\nint main(void) { return 0; }\n',
    "c/warn.c": "int main(void) { int unused; return 0; }\n",
    "c/crash.c": "int main(void) { int *p = 0; *p = 1; return 0; }\n",
    "c/aborts.c": "#include <assert.h>\nint main(void) { assert(1 + 1 == 3); return 0; }\n",
    "c/type.cpp": '#include <string>\nint main() {\n  std::string s = "a";\n  int x = s;\n  return x;\n}\n',
    "c/throws.cpp": '#include <stdexcept>\nint main() { throw std::runtime_error("disk is full"); }\n',
    "c/Makefile": (
        "all: ok semicolon\nok: ok.c\n\tgcc -o ok ok.c\nsemicolon: semicolon.c\n\tgcc -o semicolon semicolon.c\n"
    ),
    "c/Makefile.lost": "all: ghost.o\n\tgcc -o all ghost.o\n",
    "c/Makefile.tab": "all:\n    echo spaces\n",
    "cm/CMakeLists.txt": "cmake_minimum_required(VERSION 3.10)\nproject(demo C)\nadd_executable(demo main.c)\n",
    "cm/main.c": "int main(void) { return 0; }\n",
    "cmbad/CMakeLists.txt": (
        "cmake_minimum_required(VERSION 3.10)\nproject(demo C)\nfind_package(NoSuchLibrary REQUIRED)\n"
    ),
    "cmbroken/CMakeLists.txt": "cmake_minimum_required(VERSION 3.10)\nproject(demo C)\nadd_executable(demo main.c)\n",
    "cmbroken/main.c": "int main(void) { return nothing; }\n",
    "rs/ok.rs": 'fn main() { println!("hi"); }\n',
    "rs/move.rs": 'fn main() { let s = String::new(); let t = s; println!("{}{}", s, t); }\n',
    "rs/crate.rs": "use serde::Serialize;\nfn main() {}\n",
    "rs/type.rs": 'fn main() { let x: i32 = "a"; println!("{}", x); }\n',
    "rs/panic.rs": 'fn main() { let v: Vec<i32> = vec![]; println!("{}", v[3]); }\n',
    "rs/unwrap.rs": 'fn main() { let n: i32 = "x".parse().unwrap(); println!("{}", n); }\n',
    "rsok/Cargo.toml": '[package]\nname = "rsok"\nversion = "0.1.0"\nedition = "2021"\n',
    "rsok/src/lib.rs": (
        "pub fn one() -> i32 { 1 }\n#[cfg(test)]\nmod tests {\n    #[test]\n"
        "    fn it_is_one() { assert_eq!(super::one(), 1); }\n}\n"
    ),
    "rsbad/Cargo.toml": '[package]\nname = "rsbad"\nversion = "0.1.0"\nedition = "2021"\n',
    "rsbad/src/lib.rs": (
        "pub fn one() -> i32 { 1 }\n#[cfg(test)]\nmod tests {\n    #[test]\n"
        "    fn is_two() { assert_eq!(super::one(), 2); }\n    #[test]\n"
        "    fn is_one() { assert_eq!(super::one(), 1); }\n}\n"
    ),
    "rsbroken/Cargo.toml": '[package]\nname = "rsbroken"\nversion = "0.1.0"\nedition = "2021"\n',
    "rsbroken/src/main.rs": "fn main() { undefined_function(); }\n",
}

GO = {
    "gook/go.mod": "module example.com/gook\n\ngo 1.19\n",
    "gook/a.go": "package gook\n\nfunc One() int { return 1 }\n",
    "gook/a_test.go": (
        'package gook\n\nimport "testing"\n\nfunc TestOne(t *testing.T) {\n'
        '\tif One() != 1 {\n\t\tt.Fatal("no")\n\t}\n}\n'
    ),
    "gobad/go.mod": "module example.com/gobad\n\ngo 1.19\n",
    "gobad/a.go": "package gobad\n\nfunc One() int { return 1 }\n",
    "gobad/a_test.go": (
        'package gobad\n\nimport "testing"\n\nfunc TestTwo(t *testing.T) {\n\tif One() != 2 {\n'
        '\t\tt.Errorf("One() = %d, want 2", One())\n\t}\n}\n'
    ),
    "gobroken/go.mod": "module example.com/gobroken\n\ngo 1.19\n",
    "gobroken/main.go": 'package main\n\nimport "os"\n\nfunc main() {\n\tx := missing(1)\n}\n',
    "gopanic/go.mod": "module example.com/gopanic\n\ngo 1.19\n",
    "gopanic/main.go": (
        'package main\n\nimport "fmt"\n\nfunc main() {\n\tvar m map[string]int\n\tfmt.Println("x")\n\tm["a"] = 1\n}\n'
    ),
    "goindex/main.go": "package main\n\nfunc main() {\n\tn := 7\n\txs := []int{1}\n\tprintln(xs[n])\n}\n",
    "govet/go.mod": "module example.com/govet\n\ngo 1.19\n",
    "govet/main.go": 'package main\n\nimport "fmt"\n\nfunc main() {\n\tfmt.Printf("%d\\n", "text")\n}\n',
}

JAVA = {
    "java/Ok.java": 'class Ok { public static void main(String[] a) { System.out.println("ok then"); } }\n',
    "java/Symbol.java": "class Symbol { void f() { Strin s = null; } }\n",
    "java/Semicolon.java": "class Semicolon { void f() { int x = 1 } }\n",
    "java/Null.java": "class Null { public static void main(String[] a) { String s = null; s.length(); } }\n",
    "java/Cause.java": (
        'class Cause { public static void main(String[] a) {\n  try { Integer.parseInt("x1"); }\n'
        '  catch (NumberFormatException e) { throw new IllegalStateException("cannot start", e); }\n} }\n'
    ),
    "java/CalcTest.java": (
        "public class CalcTest { @org.junit.Test public void adds() { org.junit.Assert.assertEquals(2, 1 + 1); } }\n"
    ),
    "java/WrongTest.java": (
        "public class WrongTest { @org.junit.Test public void adds() { org.junit.Assert.assertEquals(3, 1 + 1); } }\n"
    ),
}
_POM = (
    '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion><groupId>demo</groupId>'
    "<artifactId>demo</artifactId><version>1</version><properties><maven.compiler.release>17</maven.compiler.release>"
    "<project.build.sourceEncoding>UTF-8</project.build.sourceEncoding></properties><dependencies><dependency>"
    "<groupId>org.junit.jupiter</groupId><artifactId>junit-jupiter</artifactId><version>5.10.2</version>"
    "<scope>test</scope></dependency></dependencies><build><plugins>"
    "<plugin><artifactId>maven-resources-plugin</artifactId><version>3.3.1</version></plugin>"
    "<plugin><artifactId>maven-compiler-plugin</artifactId><version>3.13.0</version></plugin>"
    "<plugin><artifactId>maven-surefire-plugin</artifactId><version>3.2.5</version></plugin></plugins></build></project>"
)
for _name, _body, _want in (("mvnok", "return 1;", 1), ("mvnbad", "return 1;", 2), ("mvnbroken", "return one;", 1)):
    JAVA[f"{_name}/pom.xml"] = _POM
    JAVA[f"{_name}/src/main/java/a/C.java"] = (
        f"package a;\n\npublic class C {{ public static int f() {{ {_body} }} }}\n"
    )
    JAVA[f"{_name}/src/test/java/a/CTest.java"] = (
        "package a;\n\nclass CTest { @org.junit.jupiter.api.Test void f() "
        f"{{ org.junit.jupiter.api.Assertions.assertEquals({_want}, C.f()); }} }}\n"
    )

SCRIPTS = {
    "js/undefined.js": "const user = undefined;\nconsole.log(user.name);\n",
    "js/missing.js": "require('./nowhere');\n",
    "js/syntax.js": "const x = ;\n",
    "js/reject.js": "Promise.reject(new Error('quota of 5 used up'));\n",
    "js/caught.js": "try { null.x } catch (e) { console.error(e) }\nconsole.log('went on')\n",
    "js/ok.js": "console.log('all 3 tests passed')\n",
    "js/json.js": "JSON.parse('{bad');\n",
    "js/ok.test.mjs": "import test from 'node:test';\ntest('adds', () => {});\n",
    "js/bad.test.mjs": (
        "import test from 'node:test';\nimport assert from 'node:assert';\ntest('adds', () => assert.equal(1, 2));\n"
    ),
    "npm/package.json": (
        '{"name": "demo", "version": "1.0.0", "scripts": {"ok": "node -e 0", "fail": "node -e \'process.exit(2)\'",'
        ' "test": "echo no test specified && exit 1", "lint": "no-such-linter src"}}\n'
    ),
    "npmbad/package.json": '{"name": "demo",, }\n',
    "jest/package.json": '{"name": "demo", "version": "1.0.0", "scripts": {"test": "jest"}}\n',
    "jest/sum.test.js": "test('adds', () => { expect(1 + 2).toBe(3); });\n",
    "jest/wrong.test.js": "test('adds wrongly', () => { expect(1 + 2).toBe(4); });\ntest('fine', () => {});\n",
    "jest/broken.test.js": "const x = require('./nowhere');\ntest('x', () => {});\n",
    "sh/unbound.sh": "set -eu\necho $NO_SUCH_VARIABLE\n",
    "sh/syntax.sh": "if true; then\n  echo x\n",
    "sh/ok.sh": "echo step 1\necho step 2\n",
    "pl/die.pl": "use strict;\nmy %h = (a => 1);\ndie \"no key 'port' in config\" unless $h{port};\n",
    "pl/syntax.pl": "use strict;\n$x = 1;\n",
    "pl/module.pl": "use No::Such::Module;\n",
    "rb/undefined.rb": "def f\n  nil.upcase\nend\nf\n",
    "rb/key.rb": "{a: 1}.fetch(:b)\n",
    "rb/load.rb": "require 'no_such_gem'\n",
    "php/fatal.php": "<?php\nfunction f($x) { return $x->name(); }\nf(null);\n",
    "php/parse.php": "<?php\n$x = ;\n",
    "php/ok.php": '<?php\necho "fine\\n";\n',
    "sql/schema.sql": "create table t(id integer primary key, name text not null);\ninsert into t values (1, 'a');\n",
    "sql/bad.sql": "selec 1;\n",
}

PROJECT = {**PYTHON, **TEXTS, **NATIVE, **GO, **JAVA, **SCRIPTS}
