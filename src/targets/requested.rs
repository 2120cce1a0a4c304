//! What a user asks for with several targets: flags of the form `FORMAT[:SCHEME[:gN]]=PATH`, and `[[target]]` tables of a recipe.

use std::path::{Path, PathBuf};

use formats::Scheme;

use crate::error::{Error, Result};
use crate::mixes::Mix;
use crate::recipe::{Recipe, Request, Towers, has_symmetry, preset};

/// One thing to be written.
#[derive(Clone, Debug)]
pub struct Output {
    /// The directory; for GGUF the file.
    pub path: PathBuf,
    /// What to do.
    pub recipe: Recipe,
    /// A second copy of the report.
    pub report: Option<PathBuf>,
}

/// One output that is asked for.
pub struct Requested {
    /// A directory, or for GGUF a file.
    pub path: PathBuf,
    /// Its own settings, completed by those that are said for all.
    pub request: Request,
    /// Whether its weights are what the stream sees; the first one's are where none says so.
    pub leads: bool,
    /// A second copy of its report.
    pub report: Option<PathBuf>,
}

/// Reads `FORMAT[:SCHEME[:gN]]=PATH`.
fn parse(text: &str) -> Result<(Request, PathBuf)> {
    let wrong = |why: &str| {
        Error::usage(format!(
            "--target `{text}`: {why}; say FORMAT[:SCHEME[:gN]]=PATH, as compressed-tensors:W4A16:g64=OUT or gguf:Q4_K_M=m.gguf"
        ))
    };
    let (what, path) = text.split_once('=').ok_or_else(|| wrong("it has no ="))?;
    if path.is_empty() {
        return Err(wrong("it names no place"));
    }
    Ok((parts(what, &wrong)?, PathBuf::from(path)))
}

/// Reads `FORMAT[:SCHEME[:gN]]`.
fn parts(what: &str, wrong: &dyn Fn(&str) -> Error) -> Result<Request> {
    let mut parts = what.split(':');
    let mut request = Request { format: parts.next().map(str::to_owned), ..Request::default() };
    if request.format.as_deref() == Some("") {
        return Err(wrong("it names no format"));
    }
    for part in parts {
        match part.strip_prefix(['g', 'G']).and_then(|number| number.parse::<i64>().ok()) {
            Some(group) if request.group_size.is_none() => request.group_size = Some(group),
            None if request.scheme.is_none() && request.group_size.is_none() && !part.is_empty() => {
                request.scheme = Some(part.to_owned());
            }
            _ => return Err(wrong(&format!("`{part}` is no scheme and no group size"))),
        }
    }
    Ok(request)
}

/// Reads `FORMAT[:SCHEME[:gN]]`, or `SCHEME[:gN]` alone, whose format is gguf for a mix of ggml's types and `usual` for others.
fn scheme(text: &str, usual: Option<&str>) -> Result<Request> {
    let wrong = |why: &str| {
        Error::usage(format!(
            "--scheme `{text}`: {why}; say FORMAT[:SCHEME[:gN]], as gptq:W4A16:g64, or a scheme alone, as W4A16 or Q4_K_M"
        ))
    };
    let first = text.split(':').next().unwrap_or_default().to_ascii_lowercase();
    if first == "gguf" || first.is_empty() || formats::codec::codec(&first).is_some() {
        return parts(text, &wrong);
    }
    let mix = Mix::parse(&first).is_some();
    parts(&format!("{}:{text}", if mix { "gguf" } else { usual.unwrap_or("compressed-tensors") }), &wrong)
}

/// What `--scheme` asks for, each completed by the other flags and the recipe. The outputs have no place yet.
///
/// Fails for a recipe with targets of its own.
pub fn schemes(flags: Request, file: Request, texts: &[String]) -> Result<Vec<Output>> {
    if file.path.is_some() || !file.target.is_empty() {
        return Err(Error::usage("the recipe names places to write to: say what to compare with --scheme"));
    }
    let base = flags.or(file);
    let usual = base.format.clone();
    let all = texts.iter().map(|text| scheme(text, usual.as_deref())).collect::<Result<Vec<Request>>>()?;
    let formats: Vec<String> = all.iter().map(|request| format_of(request, Path::new(""))).collect();
    let base = Request { format: None, ..base };
    if !formats.is_empty() {
        check_of_use(&base, &formats)?;
    }
    let complete = |(request, format): (Request, String)| {
        let request = Request { format: Some(format.clone()), ..request.or(for_format(base.clone(), &format)) };
        Ok(Output { path: PathBuf::new(), recipe: Recipe::resolve(request)?, report: None })
    };
    all.into_iter().zip(formats).map(complete).collect()
}

/// The format of a request for this path.
fn format_of(request: &Request, path: &Path) -> String {
    let single = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"));
    let usual = if single { "gguf" } else { "compressed-tensors" };
    request.format.clone().unwrap_or_else(|| usual.to_owned()).to_ascii_lowercase()
}

/// Brings together what is asked for: `output` of `-o`, the texts of `--target`, and `[[target]]` tables, each completed by the rest of the
/// request.
///
/// Fails where there is no output, or two ways to ask for one are mixed.
pub fn requested(mut base: Request, output: Option<PathBuf>, targets: &[String]) -> Result<Vec<Requested>> {
    let tables = std::mem::take(&mut base.target);
    if let (Some(path), true) = (&base.path, output.is_none()) {
        return Err(Error::usage(format!(
            "path = \"{}\" stands outside of a [[target]]: give -o, or put it into one",
            path.display()
        )));
    }
    if output.is_some() && !(targets.is_empty() && tables.is_empty()) {
        return Err(Error::usage(
            "-o is the short form of one --target: give all outputs as --target, or as [[target]] in the recipe",
        ));
    }
    if let Some(path) = output {
        let mut request = base;
        request.format = Some(format_of(&request, &path));
        let (leads, report) = (true, request.report.take());
        return Ok(vec![Requested { path, request, leads, report }]);
    }
    if targets.is_empty() && tables.is_empty() {
        return Err(Error::usage(
            "there is no output: give -o OUT, or --target FORMAT[:SCHEME[:gN]]=PATH as often as you like",
        ));
    }
    let mut all = Vec::new();
    for text in targets {
        let (request, path) = parse(text)?;
        all.push((request, path, false));
    }
    for mut table in tables {
        let Some(path) = table.path.take() else {
            return Err(Error::usage("a [[target]] of the recipe has no path"));
        };
        if !table.target.is_empty() {
            return Err(Error::usage("a [[target]] of the recipe holds another one"));
        }
        let leads = table.lead.take().unwrap_or(false);
        all.push((table, path, leads));
    }
    let formats: Vec<String> = all.iter().map(|(request, path, _)| format_of(request, path)).collect();
    check_of_use(&base, &formats)?;
    let several = all.len() > 1;
    let mut requested = Vec::new();
    for ((request, path, leads), format) in all.into_iter().zip(formats) {
        let mut request = request.or(for_format(base.clone(), &format));
        request.format = Some(format);
        let report = request.report.take();
        if several && report.is_some() && report == base.report {
            return Err(Error::usage(
                "--report is for one output: say report = \"FILE\" in the [[target]] that it is of",
            ));
        }
        requested.push(Requested { path, request, leads, report });
    }
    if requested.iter().filter(|one| one.leads).count() > 1 {
        return Err(Error::usage(
            "two of the recipe's targets say lead = true, and the stream sees the weights of one",
        ));
    }
    Ok(requested)
}

/// Of what is said for all targets, what one of this format takes.
fn for_format(base: Request, format: &str) -> Request {
    let mut request = base;
    if format == "gguf" {
        let ours = |name: &String| Mix::parse(name).is_some();
        request.scheme = request.scheme.filter(ours);
        (request.bits, request.group_size, request.symmetric, request.desc_act) = (None, None, None, None);
    } else {
        let codec = formats::codec::codec(format);
        let special = |name: &String| codec.is_some_and(|codec| preset(codec, name).is_some());
        let ours = |name: &String| Scheme::preset(name).is_some() || special(name);
        request.scheme = request.scheme.filter(ours);
        (request.tensor_type, request.tensor_type_file) = (None, None);
        (request.output_tensor_type, request.token_embedding_type) = (None, None);
        (request.pure, request.pre, request.split_max_size) = (None, None, None);
        request.desc_act = request.desc_act.filter(|_| format == "gptq");
        request.symmetric = request.symmetric.filter(|_| codec.is_none_or(has_symmetry));
        request.towers = request.towers.filter(|name| Towers::parse(name, format).is_ok());
    }
    request
}

/// Fails where something is said for all targets that none of them takes.
fn check_of_use(base: &Request, formats: &[String]) -> Result<()> {
    let given = |request: &Request| serde_json::to_value(request).expect("plain data");
    let whole = given(base);
    let taken: Vec<serde_json::Value> = formats.iter().map(|format| given(&for_format(base.clone(), format))).collect();
    let keys = whole.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    for (key, value) in keys {
        if taken.iter().all(|taken| taken[key] != *value) {
            return Err(Error::usage(format!("{key} is said for all targets, and is for none of their formats")));
        }
    }
    Ok(())
}

/// Resolves all of them; each with the recipe's file, and with what there is to say of all.
pub fn resolved(requested: Vec<Requested>, file: Option<&Path>) -> Result<(Vec<Output>, usize)> {
    let lead = requested.iter().position(|one| one.leads).unwrap_or(0);
    let resolve = |Requested { path, request, report, .. }: Requested| {
        let mut recipe = Recipe::resolve(request)?;
        recipe.file = file.map(Path::to_path_buf);
        Ok(Output { path: path.components().collect(), recipe, report })
    };
    Ok((requested.into_iter().map(resolve).collect::<Result<_>>()?, lead))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_says_format_scheme_group_and_place() {
        let of = |text: &str| parse(text).map(|(r, path)| (r.format.unwrap(), r.scheme, r.group_size, path));
        let path = |text: &str| PathBuf::from(text);
        assert_eq!(of("gguf=m.gguf").unwrap(), ("gguf".into(), None, None, path("m.gguf")));
        let whole = of("gptq:W4A16:g64=a=b").unwrap();
        assert_eq!(whole, ("gptq".into(), Some("W4A16".into()), Some(64), path("a=b")));
        assert_eq!(of("awq:g-1=x").unwrap(), ("awq".into(), None, Some(-1), path("x")));
        for text in ["gguf", "gguf=", "=x", "awq:g64:W4A16=x", "awq:W4A16:W4A16=x", "awq:g1:g2=x", "awq:=x"] {
            let told = of(text).unwrap_err();
            assert!(told.to_string().contains(text) && told.exit_code() == 2, "{told}");
        }
    }

    #[test]
    fn a_scheme_needs_no_format() {
        let of = |text: &str, usual| scheme(text, usual).map(|r| (r.format.unwrap(), r.scheme, r.group_size));
        assert_eq!(of("W4A16", None).unwrap(), ("compressed-tensors".into(), Some("W4A16".into()), None));
        assert_eq!(of("W4A16:g64", Some("gptq")).unwrap(), ("gptq".into(), Some("W4A16".into()), Some(64)));
        assert_eq!(of("q4_k_m", Some("gptq")).unwrap(), ("gguf".into(), Some("q4_k_m".into()), None));
        assert_eq!(of("awq:g32", None).unwrap(), ("awq".into(), None, Some(32)));
        for text in ["", ":W4A16", "W4A16:", "W4A16:W8A16", "gguf::"] {
            let told = of(text, None).unwrap_err();
            assert!(told.to_string().contains("--scheme") && told.exit_code() == 2, "{told}");
        }
        let base: Request = toml::from_str("group_size = 64\npure = true\nsamples = 8").unwrap();
        let texts = ["W4A16", "Q8_0"].map(str::to_owned);
        let all = schemes(base, Request::default(), &texts).unwrap();
        assert_eq!((all[0].recipe.samples, all[0].recipe.encoding.group()), (8, 64));
        assert!(all[1].recipe.gguf.is_some());
        let told = schemes(toml::from_str("desc_act = true").unwrap(), Request::default(), &texts).unwrap_err();
        assert!(told.to_string().contains("desc_act is said for all targets"), "{told}");
    }

    #[test]
    fn what_is_said_for_all_goes_to_those_that_take_it() {
        let base: Request = toml::from_str("scheme = 'W4A16'\ngroup_size = 64\npure = true\nsamples = 8").unwrap();
        let texts = ["compressed-tensors=a".to_owned(), "gguf=b.gguf".to_owned()];
        let all = requested(base, None, &texts).unwrap();
        assert_eq!((all[0].request.group_size, all[0].request.pure, all[0].request.samples), (Some(64), None, Some(8)));
        assert_eq!(
            (all[1].request.group_size, all[1].request.pure, all[1].request.samples),
            (None, Some(true), Some(8))
        );
        assert_eq!((&all[0].request.scheme, &all[1].request.scheme), (&Some("W4A16".to_owned()), &None));
        // What has an offset in any case takes no symmetry.
        let base: Request = toml::from_str("symmetric = false\ngroup_size = 32").unwrap();
        let both = ["gptq=a".to_owned(), "mlx:W8A16=b".to_owned()];
        let all = requested(base, None, &both).unwrap();
        assert_eq!([all[0].request.symmetric, all[1].request.symmetric], [Some(false), None]);
        assert_eq!([all[0].request.group_size, all[1].request.group_size], [Some(32); 2]);
        let base: Request = toml::from_str("desc_act = true").unwrap();
        let told = requested(base, None, &texts).err().unwrap().to_string();
        assert!(told.contains("desc_act is said for all targets"), "{told}");
    }

    #[test]
    fn tables_are_targets_and_one_may_lead() {
        let of = |toml: &str| {
            let all = requested(toml::from_str(toml).unwrap(), None, &[])?;
            let (outputs, lead) = resolved(all, None)?;
            let of = |output: Output| (output.recipe.format, output.recipe.encoding.levels.bits(), output.path);
            Ok::<_, Error>((outputs.into_iter().map(of).collect::<Vec<_>>(), lead))
        };
        let (outputs, lead) =
            of("bits = 8\n[[target]]\npath = 'a'\n[[target]]\npath = 'b'\nformat = 'gptq'\nbits = 4\nlead = true")
                .unwrap();
        let expected = [("compressed-tensors", 8, "a"), ("gptq", 4, "b")];
        assert_eq!(outputs, expected.map(|(format, bits, path)| (format.to_owned(), bits, PathBuf::from(path))));
        assert_eq!(lead, 1);
        for (toml, why) in [
            ("", "there is no output"),
            ("[[target]]\nbits = 4", "has no path"),
            ("path = 'x'", "outside of a [[target]]"),
            ("[[target]]\npath = 'a'\nlead = true\n[[target]]\npath = 'b'\nlead = true", "two of the recipe's targets"),
        ] {
            let told = of(toml).unwrap_err();
            assert!(told.to_string().contains(why) && told.exit_code() == 2, "{told}");
        }
    }
}
