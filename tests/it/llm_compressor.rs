//! Recipes of llm-compressor: what is made of one is what the same settings make in a recipe.toml.

use crate::harness::{Room, TEXT};

#[test]
fn a_recipe_of_llm_compressor_makes_what_its_settings_make_here() {
    let room = Room::new();
    room.model();
    let weights = |bits: u8, targets: &str| {
        format!(
            "weights: {{num_bits: {bits}, type: int, symmetric: true, strategy: group, group_size: 32}}, targets: [{targets}]"
        )
    };
    let groups = format!("{{a: {{{}}}, b: {{{}}}}}", weights(8, "'re:.*down_proj'"), weights(4, "'re:.*mlp.*'"));
    let args = format!(
        "{{ignore: [lm_head, 're:.*vision.*', 're:.*layers.0.mlp.(gate|up)_proj'], dampening_frac: 0.1, config_groups: {groups}}}"
    );
    room.file(
        "recipe.yaml",
        format!(
            "# As it is written beside an output.\ndefault_stage:\n  default_modifiers:\n    GPTQModifier: {args}\n"
        ),
    );
    room.file(
        "recipe.toml",
        "method = 'gptq'\ndamp = 0.1\nbits = 4\ngroup_size = 32\nignore = ['re:.*layers.0.mlp.(gate|up)_proj']\n\
         [[override]]\nmatch = 're:.*down_proj'\nbits = 8\n[[override]]\nmatch = 're:.*self_attn.*'\nignore = true\n",
    );
    let run = |recipe: &str, out: &str| {
        let words = ["--samples", "2", "--seq-len", "64", "--calibration", TEXT, "--verify-text", "none"];
        room.run([&["quantize", "model", "-o", out, "--recipe", recipe], &words[..]].concat()).succeeds();
        std::fs::read(room.path(out).join("model.safetensors")).unwrap()
    };
    assert!(run("recipe.yaml", "yaml") == run("recipe.toml", "toml"), "the two recipes make other weights");
}

#[test]
fn what_is_not_made_here_is_refused_by_name() {
    let room = Room::new();
    room.model();
    room.file("recipe.yml", "quant_stage:\n  quant_modifiers:\n    SmoothQuantModifier: {smoothing_strength: 0.8}\n");
    let words = ["recipe.yml", "SmoothQuantModifier", "AWQModifier"];
    room.run(["quantize", "model", "-o", "x", "--recipe", "recipe.yml"]).refuses(2, &words);
    room.file("bad.yaml", "quant_stage: [\n");
    room.run(["plan", "model", "--recipe", "bad.yaml"]).refuses(2, &["bad.yaml"]);
    // Names that stand for others may not grow without end.
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    (1..12).for_each(|n| bomb += &format!("a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 10].join(", ")));
    room.file("bomb.yaml", bomb);
    room.run(["plan", "model", "--recipe", "bomb.yaml"]).refuses(2, &["bomb.yaml"]);
}
