//! Templates against jinja2's own texts; `tests/fixtures/make_templates.py` makes them.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::super::ChatTemplate;

#[test]
fn templates_are_rendered_as_jinja2_renders_them_or_refused() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/templates.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let [messages, tools] = ["messages", "tools"].map(|name| golden[name].as_array().unwrap().clone());
    let (mut refused, mut lax, mut other) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for case in golden["cases"].as_array().unwrap() {
        let source = case[0].as_str().unwrap();
        let template = ChatTemplate::new("t.jinja", source, Some("<s>"), None);
        match (case[1].as_str(), template.and_then(|template| template.rendered(messages.clone(), &tools))) {
            (Some(expected), Ok(text)) if text == expected => {}
            (Some(expected), Ok(text)) => {
                if !OTHER.contains(&source) {
                    eprintln!("{source}: {text:?} and not {expected:?}");
                }
                other.insert(source);
            }
            (Some(_), Err(error)) => {
                let error = error.to_string();
                assert!(error.starts_with("t.jinja: chat template: ") && !error.contains('\n'), "{source}: {error}");
                if !REFUSED.contains(&source) {
                    eprintln!("{source}: {error}");
                }
                refused.insert(source);
            }
            (None, Ok(text)) => {
                if !LAX.contains(&source) {
                    eprintln!("{source}: {text:?}, and jinja2 refuses it");
                }
                lax.insert(source);
            }
            (None, Err(_)) => {}
        }
    }
    for (found, known) in [(other, OTHER), (refused, REFUSED), (lax, LAX)] {
        assert_eq!(found, known.iter().copied().collect());
    }
}

/// What comes out otherwise: the engine compares by what is in a list, a generator, a view or a range alike.
const OTHER: &[&str] =
    &["{{ [1]|map('string') == ['1'] }}", "{{ {'a': 1}.keys() == ['a'] }}", "{{ range(3) == [0, 1, 2] }}"];

/// What jinja2 refuses and the engine renders.
const LAX: &[&str] = &[
    "{{ 1 in 'a1' }}",
    "{{ 1 is lt 'a' }}",
    "{{ [1, 'a']|sort }}",
    "{{ messages|map(attribute='role')|last }}",
    "{{ messages|map(attribute='role') + ['a'] }}",
    "{{ {'a': 1}.keys() + ['b'] }}",
    "{{ range(3) + [1] }}",
    "{{ 1 < 'a' }}",
    "{{ none < 1 }}",
    "{% for x in none %}{{ x }}{% endfor %}",
];

/// What jinja2 renders and is refused here.
const REFUSED: &[&str] = &[
    "{{ messages[0]|attr('items') is defined }}",
    "{{ 'a'|attr('upper') is defined }}",
    "{{ namespace(a='x', b=[1e-7]) }}",
    "{{ dict([('a', 1)]) }}",
    "{{ self is defined }}",
    "{{ '٣'|int }}",
    "{{ 'ßA'.casefold() }}",
    "{{ 'ΑΣ'.casefold() }}",
    "{{ 'abc'.encode('utf8') }}",
    "{{ 'abc'.encode()|string }}",
    "{{ 'abc'.translate({97: 'x'}) }}",
    "{{ 'Ab Cd'.istitle() }}",
    "{{ 'AB'.istitle() }}",
    "{{ '½'.isnumeric() }}",
    "{{ '½'.isdigit() }}",
    "{{ '²'.isdigit() }}",
    "{{ '²'.isdecimal() }}",
    "{{ '²'.isnumeric() }}",
    "{{ '五'.isnumeric() }}",
    "{{ '五'.isdigit() }}",
    "{{ 'ßa'.capitalize() }}",
    "{{ 'ǆx'.title() }}",
    "{{ '{0} {1}'.format(1, [1e-7]) }}",
    "{{ '{:e} {:g} {:%}'.format(1.5, 1e-7, 0.5) }}",
    "{{ '{0.real}'.format(1) }}",
    r#"{{ '{!r}'.format("it's") }}"#,
    "{{ '%s is %d' % ('a', 3) }}",
    "{{ '%s' % 'a' }}",
    "{{ '%(a)s' % {'a': 1} }}",
    "{{ '%5.2f|%-5s|%05d' % (3.14159, 'a', 42) }}",
    "{{ '%s' % 1e-7 }}",
    r#"{{ '%r' % ["it's"] }}"#,
    "{{ '%s%%' % 5 }}",
    "{{ 'aaa bbb ccc'|wordwrap(5) }}",
    "{{ 'aaa bbb ccc'|wordwrap(7, true, '|') }}",
    "{{ 'aaaaaaa bb'|wordwrap(3) }}",
    "{{ 1000000|filesizeformat }}",
    "{{ 1|filesizeformat }}",
    "{{ 1536|filesizeformat(true) }}",
    "{{ 1e9|filesizeformat }}",
    "{{ [1, 2]|pprint }}",
    "{{ {'b': 1, 'a': 2}|pprint }}",
    "{{ 'a'|pprint }}",
    "{{ {'a': 1, 'b': none}|xmlattr }}",
    "{{ 'a b&c/é'|urlencode }}",
    "{{ {'a': 1, 'b': 'x y'}|urlencode }}",
    "{{ 'http://a.b'|urlize }}",
    "{{ '<'|forceescape }}",
    "{{ true|abs }}",
    "{{ {'b': 1, 'A': 2}|dictsort(true) }}",
    "{{ dict({'a': 1}.items()) }}",
    r#"{{ "a\nb"|indent('> ') }}"#,
    "{{ messages|random is defined }}",
    "{{ [1]|random }}",
    "{{ range(5)[1:3] }}",
    "{{ range(5)[1:3]|list }}",
    "{{ +1 }}",
    r#"{{ 'a\u00e9\x41\101\N{BULLET}' }}"#,
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1) }}{{ f(1, 3, 4, z=5) }}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{{ f.name }} {{ f.arguments }} {{ f('x')|upper }}{{ f() }}",
    "{% macro f() %}{{ varargs|join(',') }}|{{ varargs|length }}{% endmacro %}{{ f(1, 2) }}",
    "{% macro f() %}{{ kwargs.a }}{% for k, v in kwargs.items() %}{{ k }}{{ v }}{% endfor %}{% endmacro %}{{ f(a=1, b=2) }}",
    "{% macro f() %}{{ kwargs }}{% endmacro %}{{ f() }}{{ f(x='y') }}",
    "{% macro f() %}{{ varargs }}{% endmacro %}{{ f(1) }}",
    "{% set ns = namespace(x=[], n=0) %}{% for m in messages %}{% set ns.x = ns.x + [m.role] %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.x }}{{ ns.n }}{{ ns }}",
    "{{ self.x }}",
];
