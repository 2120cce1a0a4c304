//! The library's public surface: what is listed of it, that all of it is described, and that it does what the program does.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use syn::visit::Visit;
use syn::{Attribute, Fields, FnArg, ImplItem, Item, Meta, Pat, Type, UseTree, Visibility};

/// Every file below `src/`, parsed, with its room.
fn parsed() -> Vec<(String, syn::File)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut open = vec![root.clone()];
    let mut found = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push((path.clone(), std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    let parse = |(path, text): &(PathBuf, String)| {
        let room = path.strip_prefix(&root).unwrap().with_extension("");
        let room = room.iter().next().unwrap().to_str().unwrap().to_owned();
        (room, syn::parse_file(text).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    };
    found.iter().map(parse).collect()
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

fn said(attributes: &[Attribute], name: &str) -> bool {
    attributes.iter().any(|attribute| attribute.path().is_ident(name))
}

/// Whether documentation leaves it out.
fn is_hidden(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) => {
            let text = list.tokens.to_string().replace(' ', "");
            list.path.is_ident("doc") && text == "hidden" || list.path.is_ident("cfg_attr") && text == "doc,doc(hidden)"
        }
        _ => false,
    })
}

/// What is said of an item that a caller's code may depend on.
fn kept(attributes: &[Attribute]) -> Vec<Attribute> {
    let of_use = |attribute: &&Attribute| {
        ["derive", "non_exhaustive", "must_use"].iter().any(|name| attribute.path().is_ident(name))
    };
    attributes.iter().filter(of_use).cloned().collect()
}

/// The names that a tree of `use` brings in, and the rooms that they come from.
fn names(tree: &UseTree, room: Option<&str>, found: &mut Vec<(String, String)>) {
    match tree {
        UseTree::Path(path) if path.ident == "crate" => names(&path.tree, room, found),
        UseTree::Path(path) => names(&path.tree, room.or(Some(&path.ident.to_string())), found),
        UseTree::Name(name) => found.push((name.ident.to_string(), room.expect("of a room").to_owned())),
        UseTree::Group(group) => group.items.iter().for_each(|tree| names(tree, room, found)),
        UseTree::Rename(_) | UseTree::Glob(_) => panic!("what is public is named as it is called where it is declared"),
    }
}

/// What `src/lib.rs` offers: by its name the module that it is offered in, and the room that it comes from.
type Public = BTreeMap<String, [String; 2]>;

fn offered(items: &[Item], module: &str, found: &mut Public) {
    for item in items {
        match item {
            Item::Use(item) if is_public(&item.vis) && !is_hidden(&item.attrs) => {
                let mut all = Vec::new();
                names(&item.tree, None, &mut all);
                found.extend(all.into_iter().map(|(name, room)| (name, [module.to_owned(), room])));
            }
            Item::Mod(item) if is_public(&item.vis) && !is_hidden(&item.attrs) => {
                let (_, items) = item.content.as_ref().expect("modules that are no part of the library are hidden");
                offered(items, &format!("{module}{}::", item.ident), found);
            }
            Item::Macro(_) => panic!("macros are no part of the library"),
            _ => {}
        }
    }
}

/// Every item of a file, with those that a macro declares.
fn items(file: &syn::File) -> Vec<Item> {
    let within = |item: &Item| match item {
        Item::Macro(item) if item.ident.is_none() => item.mac.parse_body::<syn::File>().map_or(Vec::new(), |f| f.items),
        _ => Vec::new(),
    };
    let declared = file.items.iter().flat_map(within);
    file.items.iter().cloned().chain(declared).collect()
}

/// Whether an item declares something of this name.
fn declares(item: &Item, name: &str) -> bool {
    match item {
        Item::Struct(item) => item.ident == name,
        Item::Enum(item) => item.ident == name,
        Item::Type(item) => item.ident == name,
        Item::Fn(item) => item.sig.ident == name && is_public(&item.vis),
        _ => false,
    }
}

/// Whether a caller's value may be changed within is nobody's business.
fn without_mut(argument: &mut FnArg) {
    match argument {
        FnArg::Typed(argument) => {
            if let Pat::Ident(name) = &mut *argument.pat {
                name.mutability = None;
            }
        }
        FnArg::Receiver(own) if matches!(own.kind, syn::ReceiverKind::Value) => own.mutability = None,
        FnArg::Receiver(_) => {}
    }
}

/// The types that a signature or a field names.
#[derive(Default)]
struct Named(BTreeSet<String>);

impl<'ast> Visit<'ast> for Named {
    fn visit_type_path(&mut self, path: &'ast syn::TypePath) {
        if let Some(last) = path.path.segments.last() {
            self.0.insert(last.ident.to_string());
        }
        syn::visit::visit_type_path(self, path);
    }
}

/// The public surface as it is listed, and what is wrong with it.
#[derive(Default)]
struct Surface {
    /// By module and name: the declaration, and what can be done with it.
    listed: BTreeMap<(String, String), Vec<Item>>,
    named: Named,
    faults: Vec<String>,
}

impl Surface {
    fn described(&mut self, attributes: &[Attribute], what: &str) {
        if !said(attributes, "doc") {
            self.faults.push(format!("{what} is not described"));
        }
    }

    /// The public fields; one that tells of others where there are private ones.
    fn fields(&mut self, fields: &mut Fields, always: bool, what: &str) {
        let Fields::Named(all) = fields else {
            if let (Fields::Unnamed(all), false) = (&*fields, always) {
                assert!(all.unnamed.iter().all(|field| !is_public(&field.vis)), "{what}: a field without a name");
                *fields = Fields::Named(syn::parse_quote!({ private: () }));
            }
            return;
        };
        let before = all.named.len();
        let shown = all.named.iter().filter(|field| (always || is_public(&field.vis)) && !is_hidden(&field.attrs));
        let mut shown: syn::punctuated::Punctuated<syn::Field, syn::Token![,]> = shown.cloned().collect();
        for field in &mut shown {
            self.described(&field.attrs, &format!("{what}.{}", field.ident.as_ref().unwrap()));
            field.attrs = kept(&field.attrs);
            self.named.visit_type(&field.ty);
        }
        if shown.len() < before {
            shown.push(syn::parse_quote!(private: ()));
        }
        all.named = shown;
    }

    /// An item as it is listed.
    fn declaration(&mut self, item: &Item, name: &str) -> Option<Item> {
        if !declares(item, name) {
            return None;
        }
        let mut item = item.clone();
        match &mut item {
            Item::Struct(item) => {
                self.described(&item.attrs, name);
                item.attrs = kept(&item.attrs);
                self.fields(&mut item.fields, false, name);
                if let Fields::Named(_) = item.fields {
                    item.semi_token = None;
                }
            }
            Item::Enum(item) => {
                self.described(&item.attrs, name);
                item.attrs = kept(&item.attrs);
                let shown = item.variants.iter().filter(|variant| !is_hidden(&variant.attrs));
                item.variants = shown.cloned().collect();
                for variant in &mut item.variants {
                    let what = format!("{name}::{}", variant.ident);
                    self.described(&variant.attrs, &what);
                    variant.attrs.clear();
                    self.fields(&mut variant.fields, true, &what);
                }
            }
            Item::Type(item) => {
                self.described(&item.attrs, name);
                item.attrs.clear();
            }
            Item::Fn(item) => {
                self.described(&item.attrs, name);
                self.named.visit_signature(&item.sig);
                item.attrs = kept(&item.attrs);
                item.block.stmts.clear();
            }
            _ => unreachable!("it declares nothing"),
        }
        Some(item)
    }

    /// What an implementation for `name` adds to it.
    fn methods(&mut self, item: &Item, name: &str) -> Option<Item> {
        let Item::Impl(item) = item else { return None };
        let Type::Path(path) = &*item.self_ty else { return None };
        if !path.path.is_ident(name) {
            return None;
        }
        let mut item = item.clone();
        item.attrs.clear();
        if item.trait_.is_some() {
            item.items.clear();
            return Some(Item::Impl(item));
        }
        item.items.retain(|inner| match inner {
            ImplItem::Fn(method) => is_public(&method.vis) && !is_hidden(&method.attrs),
            ImplItem::Const(constant) => is_public(&constant.vis) && !is_hidden(&constant.attrs),
            _ => false,
        });
        for inner in &mut item.items {
            match inner {
                ImplItem::Fn(method) => {
                    self.described(&method.attrs, &format!("{name}::{}", method.sig.ident));
                    self.named.visit_signature(&method.sig);
                    method.attrs = kept(&method.attrs);
                    method.sig.inputs.iter_mut().for_each(without_mut);
                    method.block.stmts.clear();
                }
                ImplItem::Const(constant) => {
                    self.described(&constant.attrs, &format!("{name}::{}", constant.ident));
                    constant.attrs.clear();
                    constant.expr = syn::parse_quote!(_);
                }
                _ => {}
            }
        }
        (!item.items.is_empty()).then_some(Item::Impl(item))
    }
}

fn surface() -> (Surface, Public) {
    let files = parsed();
    let (_, root) = files.iter().find(|(room, _)| room == "lib").expect("src/lib.rs");
    let mut public = Public::new();
    offered(&root.items, "", &mut public);
    let all: Vec<(&String, Vec<Item>)> = files.iter().map(|(room, file)| (room, items(file))).collect();
    let mut surface = Surface::default();
    for (name, [module, room]) in &public {
        let own: Vec<&Item> = all.iter().filter(|(of, _)| *of == room).flat_map(|(_, items)| items).collect();
        let mut found: Vec<Item> = own.iter().filter_map(|item| surface.declaration(item, name)).collect();
        assert_eq!(found.len(), 1, "`{name}` is to be declared once in {room}, so that it is known which is public");
        // Methods may be added by rooms above, unless these have something of that name themselves.
        let other = |of: &str| {
            let items = all.iter().filter(|(room, _)| *room == of).flat_map(|(_, items)| items);
            { items }.any(|item| declares(item, name))
        };
        for (of, items) in &all {
            if *of == room || !other(of) {
                found.extend(items.iter().filter_map(|item| surface.methods(item, name)));
            }
        }
        surface.listed.insert((module.clone(), name.clone()), found);
    }
    (surface, public)
}

/// What callers can write changes with a line of docs/api.txt, and no other way.
#[test]
fn the_public_surface_is_listed() {
    let (surface, _) = surface();
    let mut text = "// What quantc offers as a library, without bodies and descriptions. A test holds this file to the code; renew it with\n\
                    // QUANTC_RENEW=1 cargo test --test it api::the_public_surface. What a change of it means: docs/library.md, \"Versions\".\n"
        .to_owned();
    for ((module, name), items) in surface.listed {
        text += &format!("\n// quantc::{module}{name}\n");
        text += &prettyplease::unparse(&syn::File { shebang: None, frontmatter: None, attrs: Vec::new(), items });
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/api.txt");
    if std::env::var_os("QUANTC_RENEW").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let listed = std::fs::read_to_string(&path).unwrap_or_default();
    let differing = listed.lines().zip(text.lines()).find(|(listed, is)| listed != is);
    assert!(
        listed == text,
        "the public surface has changed: {differing:?}; if that is meant, QUANTC_RENEW=1 cargo test --test it api::the_public_surface \
         writes docs/api.txt anew"
    );
}

/// Everything public is described, and names nothing that is not public itself or a library's whose versions are stable.
#[test]
fn the_public_surface_is_whole() {
    let (surface, public) = surface();
    assert!(surface.faults.is_empty(), "{}", surface.faults.join("\n"));
    let others = [
        "BTreeMap", "Option", "Path", "PathBuf", "Result", "Self", "String", "Value", "Vec", "Box", "P", "S", "bool",
        "f32", "f64", "i32", "i64", "io", "str", "u32", "u64", "u8", "usize", "Err",
    ];
    let missing: Vec<&String> =
        surface.named.0.iter().filter(|name| !public.contains_key(*name) && !others.contains(&&***name)).collect();
    assert!(missing.is_empty(), "the public surface names what is not public: {missing:?}");
}
