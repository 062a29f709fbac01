//! The README is tested like code: every command block runs, in the order of the page and in one
//! shell, and prints what the block after it shows.
//!
//! What differs from pasting it into a terminal, and nothing else does:
//! - `cargo run --release` starts the binary of this build, in the background and until it is ready;
//!   what else `cargo` is told is only noted.
//! - The ports 8000 and 8001 are two free ones.
//! - `docker` checks docker-compose.yml, where it can.

mod session;

use std::fs;
use std::path::Path;

use taskwire::config::SETTINGS;

use session::Session;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const README: &str = include_str!("../../README.md");

/// One block of commands.
struct Block {
    line: usize,
    text: String,
    /// What the block after it shows, with `…` for anything.
    shown: Vec<String>,
}

/// The blocks of commands on the page, in their order.
fn blocks() -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut lines = README.lines().zip(1..);
    let mut follows_commands = false;
    while let Some((line, number)) = lines.next() {
        let Some(language) = line.strip_prefix("```") else {
            follows_commands &= line.is_empty();
            continue;
        };
        let body = lines.by_ref().map(|(line, _)| line);
        let body: Vec<_> = body.take_while(|line| *line != "```").collect();
        match (language, blocks.last_mut()) {
            ("sh", _) => {
                blocks.push(Block { line: number, text: body.join("\n"), shown: Vec::new() });
            }
            ("text" | "json", Some(before)) if follows_commands => {
                before.shown = body.iter().map(|line| (*line).to_owned()).collect();
            }
            ("text" | "json", _) => {}
            _ => panic!("line {number}: `{language}` blocks are not run; commands are `sh`"),
        }
        follows_commands = language == "sh";
    }
    blocks
}

/// Without what depends on the width of a table's values.
fn plain(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether a printed line is as the page shows it.
fn is_as_shown(shown: &str, printed: &str) -> bool {
    let mut pieces = shown.split('…');
    let Some(mut rest) = printed.strip_prefix(pieces.next().unwrap_or_default()) else {
        return false;
    };
    let mut last = None;
    for piece in pieces {
        if let Some(before) = last.replace(piece) {
            match rest.find(before) {
                Some(at) => rest = &rest[at + before.len()..],
                None => return false,
            }
        }
    }
    last.map_or(rest.is_empty(), |piece| rest.ends_with(piece))
}

/// The first shown line that was not printed after the ones before it.
fn missing<'a>(shown: &'a [String], printed: &str) -> Option<&'a str> {
    let mut printed = printed.lines().map(plain);
    let shown = shown.iter().filter(|line| !line.is_empty() && *line != "…");
    let mut lines = shown.map(String::as_str);
    lines.find(|shown| !printed.any(|line| is_as_shown(&plain(shown), &line)))
}

#[test]
fn every_command_of_the_readme_runs_and_prints_what_is_shown() {
    let blocks = blocks();
    let mut session = Session::new();
    let result = session.run(&blocks);
    for block in &blocks {
        let output = session.output(block).unwrap_or_default();
        let trouble = match missing(&block.shown, &output) {
            _ if result == Err(block.line) => "the last command failed".to_owned(),
            Some(line) => format!("it did not print: {line}"),
            None => continue,
        };
        panic!(
            "README.md, line {}: {trouble}\n--- commands\n{}\n--- output\n{output}",
            block.line, block.text
        );
    }
    assert_eq!(result, Ok(()));
    assert!(session.stop(), "servers and Postgres end after SIGTERM");
}

/// Method and path of every route in the sources; `{}` stands for a parameter.
fn routes() -> Vec<(String, String)> {
    let mut routes = Vec::new();
    for file in fs::read_dir(Path::new(ROOT).join("src/http")).unwrap() {
        let source = fs::read_to_string(file.unwrap().path()).unwrap();
        for route in source.split(".route(").skip(1) {
            let path = route.split('"').nth(1).unwrap();
            let handlers = route.split('}').nth(path.matches('}').count()).unwrap();
            for method in ["get", "post", "put", "patch", "delete"] {
                if [' ', '.'].iter().any(|before| handlers.contains(&format!("{before}{method}(")))
                {
                    routes.push((method.to_uppercase(), path.to_owned()));
                }
            }
        }
    }
    routes
}

/// Method and path of every curl line of the page.
fn curls(blocks: &[Block]) -> Vec<(String, String)> {
    let mut curls = Vec::new();
    for block in blocks {
        for call in block.text.split("curl ").skip(1) {
            let starts = ["/v1/", "/healthz", "/readyz", "/metrics"];
            let Some(at) = starts.iter().filter_map(|start| call.find(start)).min() else {
                continue;
            };
            let ends = |c: char| c.is_whitespace() || "?'\")".contains(c);
            let path = call[at..].split(ends).next().unwrap();
            let method = match call.split_once("-X ") {
                Some((_, method)) => method.split_whitespace().next().unwrap(),
                None if call.contains(" -d ") => "POST",
                None => "GET",
            };
            curls.push((method.to_owned(), path.to_owned()));
        }
    }
    curls
}

fn fits(route: &str, path: &str) -> bool {
    let (route, path): (Vec<_>, Vec<_>) = (route.split('/').collect(), path.split('/').collect());
    let fits = |(part, given): (&&str, &&str)| part.starts_with('{') || part == given;
    route.len() == path.len() && route.iter().zip(&path).all(fits)
}

#[test]
fn every_route_has_a_curl_line_and_every_curl_line_a_route() {
    let (routes, curls) = (routes(), curls(&blocks()));
    assert!(routes.len() > 20, "{routes:?}");
    for (method, route) in &routes {
        assert!(
            curls.iter().any(|(m, path)| m == method && fits(route, path)),
            "{method} {route} has no curl line in README.md"
        );
        assert!(
            README.contains(&format!("| `{method} {route}` |")),
            "{method} {route} stands in no table of README.md"
        );
    }
    for (method, path) in &curls {
        // A route without parameters wins over one that has some.
        assert!(
            routes.iter().any(|(m, route)| m == method && fits(route, path)),
            "README.md calls {method} {path}, which is no route"
        );
    }
}

#[test]
fn every_setting_and_every_error_code_is_in_the_readme() {
    for setting in SETTINGS {
        let row = format!("| `{}` | `--{}` |", setting.env, setting.flag);
        assert!(README.contains(&row), "no row {row} in README.md");
    }
    let problems = fs::read_to_string(Path::new(ROOT).join("src/http/problem.rs")).unwrap();
    let codes: Vec<_> = problems
        .split("S::")
        .skip(1)
        .filter_map(|after| {
            let (status, rest) = after.split_once(',')?;
            let code = rest.trim_start().strip_prefix('"')?.split('"').next()?;
            status.bytes().all(|b| b == b'_' || b.is_ascii_uppercase()).then_some(code)
        })
        .collect();
    assert!(codes.len() > 25, "{codes:?}");
    for code in codes {
        assert!(README.contains(&format!("`{code}`")), "no `{code}` in README.md");
    }
}

#[test]
fn every_link_of_the_readme_leads_to_something() {
    let targets = README.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    for target in targets.filter(|target| !target.starts_with("https://")) {
        let found = match target.strip_prefix('#') {
            Some(anchor) => README.lines().any(|line| {
                let name = line.trim_start_matches('#').trim_start();
                line.starts_with('#')
                    && name.to_lowercase().replace(' ', "-").replace('\'', "") == anchor
            }),
            None => Path::new(ROOT).join(target).exists(),
        };
        assert!(found, "README.md links to {target}, which is not there");
    }
}

#[test]
fn an_ellipsis_stands_for_anything_and_nothing_else_does() {
    for (shown, printed) in
        [("a…", "abc"), ("…c", "abc"), ("a…b…c", "a1b2bc"), ("…", ""), ("a", "a")]
    {
        assert!(is_as_shown(shown, printed), "{shown} {printed}");
    }
    for (shown, printed) in [("a", "ab"), ("a…b", "a"), ("a…b…c", "ac"), ("b…", "ab"), ("…b", "ba")]
    {
        assert!(!is_as_shown(shown, printed), "{shown} {printed}");
    }
}
