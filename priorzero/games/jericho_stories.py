"""What is known of the games Jericho supports: maximum score, step limit, title, goal.

Maximum scores are what Jericho's source returns for each game. Step limits: LightZero's own for
zork1, detective, omniquest and acorncourt, else about twice the walkthrough's length, at least 50
and at most 500. Goals were written from general knowledge of the games: they word a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StorySettings:
    """Settings of one game. `goal` is one sentence for the prompt; "" where none is known."""

    max_score: int
    max_steps: int
    title: str
    goal: str = ""


_COLLECT = "Explore, collect the treasures and solve the puzzles that stand before them."

# Keyed by Jericho's own name of the game.
STORIES: dict[str, StorySettings] = {
    "905": StorySettings(1, 50, "9:05", "You overslept: get ready and drive away."),
    "acorncourt": StorySettings(30, 50, "The Acorn Court", "Find a way out of the courtyard."),
    "advent": StorySettings(
        350,
        500,
        "Adventure",
        "Explore Colossal Cave and bring its treasures back to the building.",
    ),
    "adventureland": StorySettings(
        100, 340, "Adventureland", "Find the thirteen treasures and store them in the right place."
    ),
    "afflicted": StorySettings(
        75, 200, "Afflicted", "Inspect the restaurant, note every violation and stay alive."
    ),
    "anchor": StorySettings(
        100, 500, "Anchorhead", "Uncover the secret of the Verlac family and stop the ritual."
    ),
    "awaken": StorySettings(50, 120, "The Awakening", "Find out who you are and what woke you."),
    "balances": StorySettings(
        51, 250, "Balances", "Learn spells and find the pieces that the puzzles hide."
    ),
    "ballyhoo": StorySettings(
        200, 500, "Ballyhoo", "Find the kidnapped daughter of the circus owner."
    ),
    "curses": StorySettings(
        550,
        500,
        "Curses",
        "Find the tourist map of Paris in the attic, and lift the family's curse.",
    ),
    "cutthroat": StorySettings(
        250, 500, "Cutthroats", "Dive to a shipwreck and bring up its treasure."
    ),
    "deephome": StorySettings(300, 500, "Deephome", "Reclaim the abandoned dwarven city."),
    "detective": StorySettings(360, 100, "Detective", "Find out who murdered the mayor."),
    "dragon": StorySettings(25, 200, "Dragon Adventure", "Rescue the princess from the dragon."),
    "enchanter": StorySettings(400, 500, "Enchanter", "Learn spells and defeat the warlock Krill."),
    "enter": StorySettings(
        20, 200, "Enter the Dark", "Explore and find what is hidden in the dark."
    ),
    "gold": StorySettings(100, 500, "Goldilocks is a Fox", "Make the fairy tale end well."),
    "hhgg": StorySettings(
        400,
        500,
        "The Hitchhiker's Guide to the Galaxy",
        "Survive the end of the Earth and reach Magrathea.",
    ),
    "hollywood": StorySettings(
        150,
        500,
        "Hollywood Hijinx",
        "Find the ten film treasures in your uncle's house within the night.",
    ),
    "huntdark": StorySettings(
        1, 140, "Hunter, in Darkness", "Hunt the Wumpus through the dark cave."
    ),
    "infidel": StorySettings(400, 500, "Infidel", "Find the lost pyramid and its burial chamber."),
    "inhumane": StorySettings(
        90, 250, "Inhumane", "Find the treasure of the pyramid, or die in all of its traps."
    ),
    "jewel": StorySettings(90, 450, "The Jewel of Knowledge", "Bring back the Jewel of Knowledge."),
    "karn": StorySettings(170, 500, "Return to Karn", "Stop what threatens Karn."),
    "library": StorySettings(
        30, 100, "All Quiet on the Library Front", "Borrow the rare biography of Graham Nelson."
    ),
    "loose": StorySettings(50, 100, "Mother Loose", "Help the nursery-rhyme folk."),
    "lostpig": StorySettings(7, 300, "Lost Pig", "Find the lost pig and bring it home."),
    "ludicorp": StorySettings(
        150, 500, "The Ludicorp Mystery", "Find out what happens in the Ludicorp building."
    ),
    "lurking": StorySettings(
        100, 500, "The Lurking Horror", "Explore the institute at night and face what lurks below."
    ),
    "moonlit": StorySettings(
        1, 120, "The Moonlit Tower", "Explore the tower and recall who you are."
    ),
    "murdac": StorySettings(250, 500, "Monsters of Murdac", _COLLECT),
    "night": StorySettings(
        10, 180, "Night at the Computer Center", "Find your way out of the computer center."
    ),
    "omniquest": StorySettings(50, 100, "OmniQuest", _COLLECT),
    "partyfoul": StorySettings(1, 120, "Party Foul", "Leave the party without being noticed."),
    "pentari": StorySettings(
        70, 100, "Pentari", "Find your way through the ruins and complete your mission."
    ),
    "planetfall": StorySettings(
        80, 500, "Planetfall", "Repair the abandoned complex and get off the planet."
    ),
    "plundered": StorySettings(
        25, 380, "Plundered Hearts", "Rescue your father from Captain Lafond."
    ),
    "reverb": StorySettings(
        50, 150, "Reverberations", "Deliver the pizza and clear up the murder."
    ),
    "seastalker": StorySettings(100, 400, "Seastalker", "Save the Aquadome with your submarine."),
    "sherbet": StorySettings(
        30, 500, "The Meteor, the Stone and a Long Glass of Sherbet", _COLLECT
    ),
    "sherlock": StorySettings(
        100,
        500,
        "Sherlock: The Riddle of the Crown Jewels",
        "Recover the Crown Jewels within 48 hours.",
    ),
    "snacktime": StorySettings(50, 70, "Snack Time!", "You are a dog: get a snack."),
    "sorcerer": StorySettings(400, 500, "Sorcerer", "Find the guild master Belboz and free him."),
    "spellbrkr": StorySettings(600, 500, "Spellbreaker", "Find the cubes of power and save magic."),
    "spirit": StorySettings(
        250, 500, "Spiritwrak", "Recover the parts of the rod and hold back Anabais."
    ),
    "temple": StorySettings(35, 360, "The Temple", "Escape from the temple with Charles."),
    "theatre": StorySettings(50, 500, "Theatre", "Get out of the old theatre and lift its curse."),
    "trinity": StorySettings(100, 500, "Trinity", "Undo the beginning of the atomic age."),
    "tryst205": StorySettings(350, 500, "Tryst of Fate", _COLLECT),
    "weapon": StorySettings(
        1, 140, "The Weapon", "Outwit your guard and gain control of the weapon."
    ),
    "wishbringer": StorySettings(
        100, 370, "Wishbringer", "Rescue the black cat from the Evil One."
    ),
    "yomomma": StorySettings(
        35, 200, "Raising the Flag on Mount Yo Momma", "Win the contest of insults."
    ),
    "zenon": StorySettings(20, 170, "Escape from Zenon", "Escape from the prison ship."),
    "zork1": StorySettings(
        350,
        500,
        "Zork I",
        "Explore the Great Underground Empire, collect its treasures and put them into "
        "the trophy case of the white house.",
    ),
    "zork2": StorySettings(
        400, 500, "Zork II", "Explore the Wizard's realm, collect its treasures and use them."
    ),
    "zork3": StorySettings(
        7, 500, "Zork III", "Prove yourself worthy to succeed the Dungeon Master."
    ),
    "ztuu": StorySettings(100, 170, "Zork: The Undiscovered Underground", _COLLECT),
}


def default_settings(name: str, max_score: int, walkthrough_length: int) -> StorySettings:
    """Settings of a game that Jericho supports and this table does not know.

    Args:
        name: Jericho's name of it.
        max_score: its own maximum.
        walkthrough_length: commands of Jericho's walkthrough; 0 where it has none.
    """
    steps = min(500, max(50, 2 * walkthrough_length)) if walkthrough_length else 200
    return StorySettings(max_score, steps, name)
