import { useState } from "react"
import { toast } from "sonner"
import { Accordion, AccordionContent, AccordionItem, AccordionTrigger } from "@/components/ui/accordion"
import { Alert, AlertTitle } from "@/components/ui/alert"
import { AlertDialog, AlertDialogTrigger } from "@/components/ui/alert-dialog"
import { AspectRatio } from "@/components/ui/aspect-ratio"
import { Badge } from "@/components/ui/badge"
import { Breadcrumb, BreadcrumbItem } from "@/components/ui/breadcrumb"
import { Button } from "@/components/ui/button"
import { Calendar } from "@/components/ui/calendar"
import { Carousel } from "@/components/ui/carousel"
import { Checkbox } from "@/components/ui/checkbox"
import { Collapsible, CollapsibleContent, CollapsibleTrigger } from "@/components/ui/collapsible"
import { Command, CommandInput, CommandItem, CommandList } from "@/components/ui/command"
import { ContextMenu, ContextMenuTrigger } from "@/components/ui/context-menu"
import { Dialog, DialogContent, DialogPortal, DialogTitle, DialogTrigger } from "@/components/ui/dialog"
import { Drawer, DrawerTrigger } from "@/components/ui/drawer"
import { ContactForm } from "@/components/ui/form"
import { HoverCard, HoverCardTrigger } from "@/components/ui/hover-card"
import { CodeInput } from "@/components/ui/input-otp"
import { Label } from "@/components/ui/label"
import { Menubar, MenubarMenu, MenubarTrigger } from "@/components/ui/menubar"
import { Pagination, PaginationLink } from "@/components/ui/pagination"
import { Popover, PopoverTrigger } from "@/components/ui/popover"
import { Progress, ProgressIndicator } from "@/components/ui/progress"
import { RadioGroup, RadioGroupItem } from "@/components/ui/radio-group"
import { ResizableGroup, ResizableHandle, ResizablePanel } from "@/components/ui/resizable"
import { ScrollArea, ScrollAreaViewport } from "@/components/ui/scroll-area"
import { Select, SelectTrigger, SelectValue } from "@/components/ui/select"
import { Sidebar, SidebarItem } from "@/components/ui/sidebar"
import { Slider, SliderRange, SliderThumb, SliderTrack } from "@/components/ui/slider"
import { Switch, SwitchThumb } from "@/components/ui/switch"
import { Table, TableCell, TableRow } from "@/components/ui/table"
import { Tabs, TabsContent, TabsList, TabsTrigger } from "@/components/ui/tabs"
import { Textarea } from "@/components/ui/textarea"
import { ToastProvider, ToastViewport } from "@/components/ui/toast"
import { Toggle } from "@/components/ui/toggle"
import { ToggleGroup, ToggleGroupItem } from "@/components/ui/toggle-group"
import { Tooltip, TooltipTrigger } from "@/components/ui/tooltip"

/** One of each component, so that the page needs all of them. */
export function Parts() {
  const [date, setDate] = useState<Date>()
  return (
    <div className="mt-8 grid gap-4 md:grid-cols-3">
      <Accordion type="single" collapsible>
        <AccordionItem value="a">
          <AccordionTrigger>More</AccordionTrigger>
          <AccordionContent>There it is.</AccordionContent>
        </AccordionItem>
      </Accordion>
      <Alert>
        <AlertTitle>Heads up</AlertTitle>
      </Alert>
      <AlertDialog>
        <AlertDialogTrigger>Delete</AlertDialogTrigger>
      </AlertDialog>
      <AspectRatio ratio={2}>
        <Badge>two to one</Badge>
      </AspectRatio>
      <Breadcrumb>
        <BreadcrumbItem>Home</BreadcrumbItem>
      </Breadcrumb>
      <Button onClick={() => toast("Done")}>Toast</Button>
      <Calendar mode="single" selected={date} onSelect={setDate} />
      <Carousel slides={["one", "two"]} />
      <Checkbox aria-label="Yes" />
      <Collapsible>
        <CollapsibleTrigger>Open</CollapsibleTrigger>
        <CollapsibleContent>Opened</CollapsibleContent>
      </Collapsible>
      <Command>
        <CommandInput placeholder="Find" />
        <CommandList>
          <CommandItem>First</CommandItem>
        </CommandList>
      </Command>
      <ContextMenu>
        <ContextMenuTrigger>Right-click</ContextMenuTrigger>
      </ContextMenu>
      <Dialog>
        <DialogTrigger>Dialog</DialogTrigger>
        <DialogPortal>
          <DialogContent>
            <DialogTitle>Hello</DialogTitle>
          </DialogContent>
        </DialogPortal>
      </Dialog>
      <Drawer>
        <DrawerTrigger>Drawer</DrawerTrigger>
      </Drawer>
      <ContactForm onSend={(email) => toast(email)} />
      <HoverCard>
        <HoverCardTrigger>Hover</HoverCardTrigger>
      </HoverCard>
      <CodeInput />
      <Label>Label</Label>
      <Menubar>
        <MenubarMenu>
          <MenubarTrigger>File</MenubarTrigger>
        </MenubarMenu>
      </Menubar>
      <Pagination>
        <PaginationLink href="#">1</PaginationLink>
      </Pagination>
      <Popover>
        <PopoverTrigger>Popover</PopoverTrigger>
      </Popover>
      <Progress value={40}>
        <ProgressIndicator style={{ width: "40%" }} />
      </Progress>
      <RadioGroup defaultValue="a">
        <RadioGroupItem value="a" />
      </RadioGroup>
      <ResizableGroup direction="horizontal">
        <ResizablePanel>Left</ResizablePanel>
        <ResizableHandle />
        <ResizablePanel>Right</ResizablePanel>
      </ResizableGroup>
      <ScrollArea>
        <ScrollAreaViewport>Scroll</ScrollAreaViewport>
      </ScrollArea>
      <Select>
        <SelectTrigger>
          <SelectValue placeholder="Choose" />
        </SelectTrigger>
      </Select>
      <Sidebar>
        <SidebarItem>Item</SidebarItem>
      </Sidebar>
      <Slider defaultValue={[30]}>
        <SliderTrack>
          <SliderRange />
        </SliderTrack>
        <SliderThumb />
      </Slider>
      <Switch aria-label="On">
        <SwitchThumb />
      </Switch>
      <Table>
        <tbody>
          <TableRow>
            <TableCell>Cell</TableCell>
          </TableRow>
        </tbody>
      </Table>
      <Tabs defaultValue="a">
        <TabsList>
          <TabsTrigger value="a">A</TabsTrigger>
        </TabsList>
        <TabsContent value="a">Content</TabsContent>
      </Tabs>
      <Textarea aria-label="Text" />
      <ToastProvider>
        <ToastViewport />
      </ToastProvider>
      <Toggle>Toggle</Toggle>
      <ToggleGroup type="single">
        <ToggleGroupItem value="a">A</ToggleGroupItem>
      </ToggleGroup>
      <Tooltip>
        <TooltipTrigger>Tip</TooltipTrigger>
      </Tooltip>
    </div>
  )
}
