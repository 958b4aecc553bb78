import { render } from "preact";
import { act } from "preact/test-utils";
import { beforeEach, expect, test } from "vitest";
import { Typed } from "../src/editor/ui/forms.js";

const place = document.createElement("div");
const field = () => place.querySelector("input")!;
const button = () => place.querySelector("button")!;
let asked: { readonly text: string; readonly answer: (done: boolean) => void }[];

function show(initial?: string) {
  const run = (text: string) => new Promise<boolean>((answer) => asked.push({ text, answer }));
  return act(() =>
    render(
      <Typed label="Domain" verb="Change" hint="" run={run} {...(initial !== undefined && { initial })} />,
      place,
    ),
  );
}

const type = (text: string) =>
  act(() => {
    field().value = text;
    field().dispatchEvent(new Event("input"));
  });

const submit = () => act(() => void place.querySelector("form")!.dispatchEvent(new Event("submit")));
const answer = (done: boolean) =>
  act(async () => {
    asked.pop()!.answer(done);
    await new Promise((resolve) => setTimeout(resolve));
  });

beforeEach(() => {
  asked = [];
  render(null, place);
});

test("a value that changes elsewhere is shown, but takes nothing that was typed", async () => {
  await show("a.test");
  expect([field().value, button().disabled]).toEqual(["a.test", true]);
  await show("b.test");
  expect(field().value).toBe("b.test");
  await type("mine.test");
  await show("c.test");
  expect([field().value, button().disabled]).toEqual(["mine.test", false]);
});

test.each([["before"], ["after"]])(
  "the value that was made of it is shown, told %s the answer",
  async (when) => {
    await show("a.test");
    await type("B.TEST");
    await submit();
    expect(asked[0]!.text).toBe("B.TEST");
    if (when === "before") await show("b.test");
    await answer(true);
    if (when === "after") {
      expect(field().value).toBe("B.TEST");
      await show("b.test");
    }
    expect([field().value, button().disabled]).toEqual(["b.test", true]);
    await show("c.test");
    expect(field().value).toBe("c.test");
  },
);

test("what was refused, or is typed meanwhile, stays", async () => {
  await show("a.test");
  await type("taken.test");
  await submit();
  await answer(false);
  expect([field().value, button().disabled]).toEqual(["taken.test", false]);
  await submit();
  await type("other.test");
  await show("b.test");
  await answer(false);
  expect(field().value).toBe("other.test");
});

test("without a value of its own it is emptied when it is done, but for what is typed meanwhile", async () => {
  await show();
  expect(button().disabled).toBe(true);
  await type("one");
  await submit();
  await answer(true);
  expect(field().value).toBe("");
  await type("two");
  await submit();
  await type("three");
  await answer(true);
  expect(field().value).toBe("three");
});
